"""What can go wrong with a cluster on this machine. Every message is for the person at the terminal.

RuntimeFailure
├── AlreadyRunning   another launcher owns the run directory
├── PortBusy
└── StartFailed      a process ended or was not ready in time; carries the last lines of its log
"""

from collections.abc import Sequence


class RuntimeFailure(Exception):
    pass


class AlreadyRunning(RuntimeFailure):
    pass


class PortBusy(RuntimeFailure):
    pass


class StartFailed(RuntimeFailure):
    def __init__(self, message: str, *, log_tail: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.log_tail = tuple(log_tail)
