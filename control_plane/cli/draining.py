"""A worker that drains, as `penstock drain` follows it: what it waits for, and what it has left in the end."""

import time
from typing import TYPE_CHECKING

from control_plane.cli.failures import CommandFailed

if TYPE_CHECKING:
    import grpc

    from protos import worker_pb2, worker_pb2_grpc

_RPC_TIMEOUT_S = 5.0
_FOLLOW_EVERY_S = 0.2
# For the reply that it has stopped, once it does not answer any more.
_LAST_WORDS_S = 5.0


class Draining:
    """`begin` asks the worker, `follow` waits until it has gone."""

    def __init__(self, stub: "worker_pb2_grpc.WorkerStub", worker: "worker_pb2.WorkerDescription") -> None:
        self._stub = stub
        self._worker = worker
        self._end: grpc.CallFuture[worker_pb2.DrainReply] | None = None

    def begin(self, *, timeout_s: float | None) -> None:
        """Raises CommandFailed if the worker does not agree."""
        import grpc

        from protos import worker_pb2

        name, own = self._worker.worker_id, timeout_s or 0.0
        # Asked first, because a worker that has nothing is gone before it can be asked again; and without a deadline:
        # its own is not known here, and `follow` notices if it is gone.
        self._end = self._stub.Drain.future(worker_pb2.DrainRequest(timeout_s=own, until_stopped=True))
        try:
            has = self._stub.Drain(worker_pb2.DrainRequest(timeout_s=own), timeout=_RPC_TIMEOUT_S)
        except grpc.RpcError as e:
            if self._last_words() is None:
                raise CommandFailed(f"{name} does not drain: {e.code().name.lower()}: {e.details()}") from e
            return
        print(f"{name} takes no new requests; it has {describe_left(has) or 'none'}", flush=True)

    def follow(self) -> "worker_pb2.DrainReply | None":
        """What it has left. Prints what it waits for, whenever that changes. None: it has not said."""
        said = ""
        assert self._end is not None, "begin comes first"
        while not self._end.done():
            waits_for = self._waits_for()
            if waits_for is None:
                break
            if waits_for != said:
                print(f"{self._worker.worker_id} waits for {waits_for}", flush=True)
                said = waits_for
            time.sleep(_FOLLOW_EVERY_S)
        return self._last_words()

    def _last_words(self) -> "worker_pb2.DrainReply | None":
        """None: it has said nothing, or no."""
        import grpc

        assert self._end is not None, "begin comes first"
        try:
            return self._end.result(timeout=_LAST_WORDS_S)
        except (grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError):
            return None

    def _waits_for(self) -> str | None:
        """None: it has gone."""
        import grpc

        from protos import worker_pb2

        try:
            now = self._stub.Describe(worker_pb2.DescribeRequest(), timeout=_RPC_TIMEOUT_S)
        except grpc.RpcError as e:
            if e.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise CommandFailed(f"{self._worker.worker_id} does not answer any more") from e
            return None
        if now.epoch != self._worker.epoch:
            return None
        load = now.load
        counts = ((load.num_running + load.num_waiting, "request"), (load.num_leases, "lease"))
        return _counted(counts) or "blocks on their way to memory and stores"


def describe_left(left: "worker_pb2.DrainReply") -> str:
    """In words; empty for nothing."""
    counts = ((left.num_requests, "request"), (left.num_leases, "lease"), (left.num_blocks, "block"))
    return _counted(counts)


def _counted(counts: tuple[tuple[int, str], ...]) -> str:
    return ", ".join(f"{number} {what}{'s' if number != 1 else ''}" for number, what in counts if number)
