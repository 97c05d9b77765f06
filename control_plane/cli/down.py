"""`penstock down`: stops the cluster of a run directory, also one whose launcher was killed."""

import signal
import time
from pathlib import Path
from typing import Annotated

import typer

from control_plane.cli import options
from control_plane.cli.failures import CommandFailed, clean_errors
from control_plane.runtimes.errors import AlreadyRunning
from control_plane.runtimes.stale import clear_stale, wait_gone
from control_plane.runtimes.state import lock, read_state

LOCK_TIMEOUT_S = 2.0


def down(
    config: options.ConfigOption = None,
    run_dir: options.RunDirOption = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds until what still runs is killed.")
    ] = 45.0,
) -> None:
    """Stop the cluster that `penstock up` started here."""
    with clean_errors():
        print(stop_cluster(options.load(config, run_dir).run_dir, timeout_s=timeout_s))


def stop_cluster(run_dir: Path, *, timeout_s: float) -> str:
    """What was done, in a sentence. Raises CommandFailed if something still runs."""
    state = read_state(run_dir)
    if state is None:
        return f"Nothing runs in {run_dir}."
    processes = [state.launcher, *(process.process_id for process in state.processes if process.process_id)]
    if not state.launcher.is_alive():
        return _clear(run_dir, "Its launcher had been killed; removed what it left", timeout_s=timeout_s)
    state.launcher.send(signal.SIGTERM)
    if wait_gone(processes, timeout_s=timeout_s):
        return f"Stopped the cluster in {run_dir}."
    # The kernel kills the others with their launcher.
    state.launcher.send(signal.SIGKILL)
    wait_gone(processes, timeout_s=5.0)
    return _clear(run_dir, f"Killed: it did not stop within {timeout_s:g} s; cleared", timeout_s=5.0)


def _clear(run_dir: Path, done: str, *, timeout_s: float) -> str:
    deadline_s = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            with lock(run_dir):
                clear_stale(run_dir, timeout_s=timeout_s)
            return f"{done} in {run_dir}."
        except AlreadyRunning as e:
            # Or the launcher that was killed: its other threads hold its files a moment longer than it seems to live.
            if time.monotonic() > deadline_s:
                raise CommandFailed(f"another cluster has just been started in {run_dir}") from e
            time.sleep(0.02)
