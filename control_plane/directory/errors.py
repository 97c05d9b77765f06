"""Why the directory refuses a message.

    DirectoryError
    ├── UnknownWorker   not registered (any more): register again and send a snapshot
    └── StaleEpoch      another incarnation of this worker has taken its place

`control_plane.directory.server` maps them to gRPC statuses.
"""


class DirectoryError(Exception):
    """Base of all refusals; the message names the offending value and what would be right."""


class UnknownWorker(DirectoryError):
    pass


class StaleEpoch(DirectoryError):
    pass
