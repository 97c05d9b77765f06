"""Who is in the directory and how busy: the one place of the command line that speaks gRPC."""

from dataclasses import dataclass

import grpc

from protos import directory_pb2, directory_pb2_grpc


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberLoad:
    worker_id: str
    role: str
    epoch: int
    pid: int
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_pages: int
    num_free_pages: int
    num_leases: int


_ROLES = {1: "prefill", 2: "decode", 3: "mixed"}


def fetch_members(address: str, *, timeout_s: float) -> list[MemberLoad] | None:
    """The members at this moment; None if no directory answers at `address`."""
    members: list[MemberLoad] = []
    with grpc.insecure_channel(address) as channel:
        events = directory_pb2_grpc.DirectoryStub(channel).Watch(
            directory_pb2.WatchRequest(), timeout=timeout_s
        )
        try:
            for event in events:
                if event.kind == directory_pb2.WatchEvent.SYNCED:
                    return members
                members.append(_member(event))
        except grpc.RpcError:
            return None
        finally:
            events.cancel()  # type: ignore[no-untyped-call]
    return None


def _member(event: directory_pb2.WatchEvent) -> MemberLoad:
    worker, load = event.worker, event.worker.load
    return MemberLoad(
        worker_id=worker.worker_id,
        role=_ROLES.get(worker.role, "unknown"),
        epoch=worker.epoch,
        pid=worker.pid,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_waiting_tokens=load.num_waiting_tokens,
        num_pages=load.num_pages,
        num_free_pages=load.num_free_pages,
        num_leases=load.num_leases,
    )
