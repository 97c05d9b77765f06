"""`penstock drain` takes a worker out of service when it has finished what it has; `penstock resume` brings it back."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from control_plane.cli import options
from control_plane.cli.draining import Draining, describe_left
from control_plane.cli.failures import LEFT, CommandFailed, clean_errors, say_error
from control_plane.runtimes import service
from control_plane.runtimes.state import RunState, Status, read_state

if TYPE_CHECKING:
    from protos import worker_pb2

WorkerArgument = Annotated[str, typer.Argument(metavar="WORKER", help="Its name, as in penstock status.")]


def drain(
    worker: WorkerArgument,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            "--timeout", min=0.001, help="Seconds until it goes all the same. (default: its drain_timeout_s)"
        ),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Start it again once it has gone.")] = False,
    config: options.ConfigOption = None,
    run_dir: options.RunDirOption = None,
) -> None:
    """Let a worker finish what it has, take nothing new, and end. It stays away until penstock resume.

    The exit code is 3 if it had to leave something at its deadline.
    """
    with clean_errors():
        import grpc

        from protos import worker_pb2_grpc

        loaded = options.load(config, run_dir)
        state = _running(read_state(loaded.run_dir), loaded.run_dir)
        if _is_drained(state, worker):
            if restart:
                raise CommandFailed(f"{worker} is drained already; penstock resume {worker} starts it again")
            print(f"{worker} is drained; penstock resume {worker} starts it again")
            return
        member = _member(state, worker)
        is_ours = any(process.name == worker for process in state.processes)
        takes_out = is_ours and not restart and not service.is_out(loaded.run_dir, worker)
        if takes_out:
            service.take_out(loaded.run_dir, worker)
        with grpc.insecure_channel(member.control_address) as channel:
            draining = Draining(worker_pb2_grpc.WorkerStub(channel), member)
            try:
                draining.begin(timeout_s=timeout_s)
            except CommandFailed:
                if takes_out:  # or else it is leaving because of another drain
                    service.put_back(loaded.run_dir, worker)
                raise
            left = draining.follow()
        # Asked only now: meanwhile it may have been resumed, or taken out by another drain.
        _conclude(worker, left, stays_away=service.is_out(loaded.run_dir, worker))


def resume(
    worker: WorkerArgument, config: options.ConfigOption = None, run_dir: options.RunDirOption = None
) -> None:
    """Start a worker again that penstock drain took out of service."""
    with clean_errors():
        loaded = options.load(config, run_dir)
        state = _running(read_state(loaded.run_dir), loaded.run_dir)
        known = [process.name for process in state.processes if process.pool]
        if worker not in known:
            raise _unknown(worker, known)
        if not service.is_out(loaded.run_dir, worker):
            raise CommandFailed(f"{worker!r} is not out of service")
        service.put_back(loaded.run_dir, worker)
        print(f"{worker} starts; penstock status shows when it is ready")


def _is_drained(state: RunState, worker: str) -> bool:
    return any(process.name == worker and process.status is Status.DRAINED for process in state.processes)


def _member(state: RunState, worker: str) -> "worker_pb2.WorkerDescription":
    from control_plane.cli.tiers import find_workers

    known = {one.worker_id: one for one in find_workers(state)}
    if worker in known:
        return known[worker]
    for process in state.processes:
        if process.name == worker and process.pool:
            raise CommandFailed(
                f"{worker} is {process.status.value} and not in the directory: it cannot be asked to drain"
            )
    raise _unknown(worker, known)


def _unknown(worker: str, known: Iterable[str]) -> CommandFailed:
    return CommandFailed(f"there is no worker {worker!r}; known here: {', '.join(known) or 'none'}")


def _conclude(worker: str, left: "worker_pb2.DrainReply | None", *, stays_away: bool) -> None:
    if left is None:
        raise CommandFailed(f"{worker} has gone without a word of what it left; its log may say more")
    resume_hint = f"; penstock resume {worker} starts it again" if stays_away else ""
    what = describe_left(left)
    if not what:
        print(f"{worker} has gone{resume_hint}")
        return
    # A gateway numbers its attempts after this sign; top and clients know the request without it.
    names = ", ".join(request_id.partition("#")[0] for request_id in left.request_ids)
    say_error(f"{worker} has gone and left {what}{f' ({names})' if names else ''}{resume_hint}")
    raise typer.Exit(LEFT)


def _running(state: RunState | None, run_dir: Path) -> RunState:
    if state is None or not state.launcher.is_alive():
        raise options.nothing_runs(run_dir)
    return state
