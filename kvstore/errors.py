"""What can go wrong while blocks travel, rest and are coded.

    TransferError
    ├── TransferRefused      the source said no: an unknown or used ticket, or it gave the transfer up
    ├── TransferInterrupted  the connection broke, could not be made, or the peer fell silent
    └── TransferCorrupted    the bytes are not what was agreed: garbage, checksum, sizes, order

    TierError
    ├── TierUnusable         a tier cannot be opened: no such key, another version, not our directory
    └── DiskFailed           reading or writing failed: full, read-only, removed, or a corrupted block

    CodecError
    ├── CodecCorrupted       truncated or garbled: nothing of it was written anywhere
    └── ProfileMismatch      coded with, or profiled for, something else than what we have

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


class TierError(Exception):
    """Base of all errors of a tier; the message names the file or the block."""


class TierUnusable(TierError):
    pass


class DiskFailed(TierError):
    pass


class CodecError(Exception):
    """Base of all errors of the codec; the message names the offending value and what would be right."""


class CodecCorrupted(CodecError):
    pass


class ProfileMismatch(CodecError):
    pass
