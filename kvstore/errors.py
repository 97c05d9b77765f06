"""What can go wrong while blocks travel.

    TransferError
    ├── TransferRefused      the source said no: an unknown or used ticket, or it gave the transfer up
    ├── TransferInterrupted  the connection broke, could not be made, or the peer fell silent
    └── TransferCorrupted    the bytes are not what was agreed: garbage, checksum, sizes, order

Whoever pulls maps them to the errors of its own package.
"""


class TransferError(Exception):
    """Base of all errors of a transfer; the message names the peer and the offending value."""


class TransferRefused(TransferError):
    pass


class TransferInterrupted(TransferError):
    pass


class TransferCorrupted(TransferError):
    pass
