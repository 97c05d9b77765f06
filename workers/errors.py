"""What can go wrong in a worker.

    WorkerError
    ├── InvalidRequest     the request can never run here
    ├── QueueFull          try again later or elsewhere
    ├── WorkerDraining     this worker is about to end; try elsewhere
    ├── CheckpointError    the model on disk is missing, truncated, of another shape or unsupported
    ├── CannotListen       an address of this worker is taken or not ours
    ├── MoveFailed         a request that runs elsewhere could not be moved here, and goes on there
    ├── EngineFailed       a step raised; its requests end, and after several in a row the process
    └── PullError          a hand-over failed; the request is recomputed here
        ├── PullRefused        the source does not agree: epoch, fingerprint, layout, no such lease
        ├── PullInterrupted    the connection broke or the source fell silent
        └── PullCorrupted      the bytes do not fit what was agreed: garbage, checksum, order

`workers.wire` maps them to gRPC statuses and `Failure` codes.
"""


class WorkerError(Exception):
    """Base of all errors of a worker; the message names the offending value and what would be right."""


class InvalidRequest(WorkerError):
    pass


class QueueFull(WorkerError):
    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WorkerDraining(WorkerError):
    pass


class CheckpointError(WorkerError):
    pass


class CannotListen(WorkerError):
    pass


class MoveFailed(WorkerError):
    pass


class EngineFailed(WorkerError):
    pass


class PullError(WorkerError):
    pass


class PullRefused(PullError):
    pass


class PullInterrupted(PullError):
    pass


class PullCorrupted(PullError):
    pass
