"""`penstock drain` takes a worker out of service when it has finished what it has; `penstock resume` brings it back."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from control_plane.cli import options
from control_plane.cli.failures import CommandFailed, clean_errors
from control_plane.runtimes import service
from control_plane.runtimes.state import RunState, read_state

if TYPE_CHECKING:
    from protos import worker_pb2, worker_pb2_grpc

_RPC_TIMEOUT_S = 5.0
_FOLLOW_EVERY_S = 0.2

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
    """Let a worker finish what it has, take nothing new, and end. It stays away until penstock resume."""
    with clean_errors():
        import grpc

        from control_plane.cli.tiers import find_workers
        from protos import worker_pb2_grpc

        loaded = options.load(config, run_dir)
        state = _running(read_state(loaded.run_dir), loaded.run_dir)
        known = {one.worker_id: one for one in find_workers(state)}
        if worker not in known:
            raise CommandFailed(f"there is no worker {worker!r}; known here: {', '.join(known) or 'none'}")
        stays_away = not restart and any(process.name == worker for process in state.processes)
        takes_out = stays_away and not service.is_out(loaded.run_dir, worker)
        if takes_out:
            service.take_out(loaded.run_dir, worker)
        with grpc.insecure_channel(known[worker].control_address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            try:
                _ask(stub, worker, timeout_s=timeout_s)
            except CommandFailed:
                if takes_out:  # or else it is leaving because of another drain
                    service.put_back(loaded.run_dir, worker)
                raise
            _follow(stub, known[worker])
        print(f"{worker} has gone" + (f"; penstock resume {worker} starts it again" if stays_away else ""))


def resume(
    worker: WorkerArgument, config: options.ConfigOption = None, run_dir: options.RunDirOption = None
) -> None:
    """Start a worker again that penstock drain took out of service."""
    with clean_errors():
        loaded = options.load(config, run_dir)
        _running(read_state(loaded.run_dir), loaded.run_dir)
        if not service.is_out(loaded.run_dir, worker):
            raise CommandFailed(f"{worker!r} is not out of service")
        service.put_back(loaded.run_dir, worker)
        print(f"{worker} starts; penstock status shows when it is ready")


def _ask(stub: "worker_pb2_grpc.WorkerStub", worker: str, *, timeout_s: float | None) -> None:
    import grpc

    from protos import worker_pb2

    try:
        reply = stub.Drain(worker_pb2.DrainRequest(timeout_s=timeout_s or 0.0), timeout=_RPC_TIMEOUT_S)
    except grpc.RpcError as e:
        raise CommandFailed(f"{worker} does not drain: {e.code().name.lower()}: {e.details()}") from e
    print(f"{worker} takes no new requests; it has {reply.num_requests}")


def _follow(stub: "worker_pb2_grpc.WorkerStub", worker: "worker_pb2.WorkerDescription") -> None:
    """Prints what it waits for, whenever that changes, until it has gone."""
    import grpc

    from protos import worker_pb2

    said = ""
    while True:
        try:
            now = stub.Describe(worker_pb2.DescribeRequest(), timeout=_RPC_TIMEOUT_S)
        except grpc.RpcError as e:
            if e.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise CommandFailed(f"{worker.worker_id} does not answer any more") from e
            return
        if now.epoch != worker.epoch:
            return
        waits_for = _waits_for(now.load)
        if waits_for != said:
            print(f"{worker.worker_id} waits for {waits_for}", flush=True)
            said = waits_for
        time.sleep(_FOLLOW_EVERY_S)


def _waits_for(load: "worker_pb2.WorkerLoad") -> str:
    parts = ((load.num_running + load.num_waiting, "request"), (load.num_leases, "lease"))
    counted = [f"{number} {what}{'s' if number != 1 else ''}" for number, what in parts if number]
    return " and ".join(counted) or "blocks to be written"


def _running(state: RunState | None, run_dir: object) -> RunState:
    if state is None or not state.launcher.is_alive():
        raise CommandFailed(f"nothing runs in {run_dir}; penstock up starts a cluster")
    return state
