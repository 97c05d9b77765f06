"""What can go wrong with a request, as its client sees it.

    RequestError
    ├── InvalidRequest      400  the request can never succeed
    ├── ModelNotFound       404
    ├── PoisonRequest       422  two workers died of it; never to be retried
    ├── QueueFull           429  carries `retry_after_s`
    ├── GenerationFailed    500  the pools accepted the request and could not finish it
    ├── NoWorkers           503  nobody can serve it now; carries `retry_after_s`
    ├── GenerationTimeout   504  no progress within the deadline
    │   What an operator may see:
    ├── RequestNotFound     404  it does not run here; perhaps it has ended
    ├── WorkerNotFound      404  no such worker is known here
    └── CannotMove          409  the request or the worker is not in a state to move it, or to take it

`control_plane.gateway.failures` is the one table that maps them to HTTP and gRPC statuses.
"""


class RequestError(Exception):
    """Base of all errors that a client may see. `message` names the offending value and what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(RequestError):
    """`param` is the JSON field at fault; `code` is OpenAI's machine-readable code, where it has one."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelNotFound(RequestError):
    pass


class PoisonRequest(RequestError):
    pass


class QueueFull(RequestError):
    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GenerationFailed(RequestError):
    pass


class NoWorkers(RequestError):
    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GenerationTimeout(RequestError):
    pass


class RequestNotFound(RequestError):
    pass


class WorkerNotFound(RequestError):
    pass


class CannotMove(RequestError):
    pass
