"""What a launcher that was killed leaves behind: found by its state file, removed process by process."""

import signal
import time
from collections.abc import Sequence
from pathlib import Path

from control_plane.runtimes.process_id import ProcessId
from control_plane.runtimes.state import read_state, remove_leftovers

_POLL_S = 0.02


def clear_stale(run_dir: Path, *, timeout_s: float) -> bool:
    """Ends every process of a dead launcher and removes its files; True if there were any. Needs the lock."""
    state = read_state(run_dir)
    if state is None:
        return False
    survivors = [process.process_id for process in state.processes if process.process_id]
    end_processes(survivors, timeout_s=timeout_s)
    remove_leftovers(run_dir)
    return True


def end_processes(processes: Sequence[ProcessId], *, timeout_s: float) -> bool:
    """SIGTERM to all, SIGKILL to those still alive after `timeout_s`. True if that was not needed."""
    for process in processes:
        process.send(signal.SIGTERM)
    if wait_gone(processes, timeout_s=timeout_s):
        return True
    for process in processes:
        process.send(signal.SIGKILL)
    wait_gone(processes, timeout_s=timeout_s)
    return False


def wait_gone(processes: Sequence[ProcessId], *, timeout_s: float) -> bool:
    """True once none is alive; False after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
