"""A process by its pid *and* its start time: the pid alone may be somebody else's by now."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessId:
    pid: int
    start_ticks: int  # since boot, from /proc/PID/stat

    def is_alive(self) -> bool:
        """A zombie counts as dead: it holds nothing but its exit code."""
        found = _stat(self.pid)
        return found is not None and found == (self.start_ticks, True)

    def send(self, signal_number: signal.Signals) -> None:
        """Signals the process if it is still the one we mean; else nothing happens."""
        try:
            handle = os.pidfd_open(self.pid)
        except (ProcessLookupError, PermissionError):
            return
        try:
            # The handle was taken first, so it is this very process that is_alive compares.
            if self.is_alive():
                signal.pidfd_send_signal(handle, signal_number)
        except ProcessLookupError:
            pass
        finally:
            os.close(handle)


def identify(pid: int) -> ProcessId | None:
    """None if there is no such process."""
    found = _stat(pid)
    return ProcessId(pid, found[0]) if found else None


def _stat(pid: int) -> tuple[int, bool] | None:
    """(start ticks, running) by proc(5). Split after the command's name: it may hold spaces and parentheses."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return int(fields[19]), fields[0] not in ("Z", "X")
