"""Who is in the directory, how busy, and where to reach them."""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from protos import directory_pb2, directory_pb2_grpc, worker_pb2


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
    num_demanded_pages: int
    is_draining: bool


_ROLES = {1: "prefill", 2: "decode", 3: "mixed", 4: "store"}


def fetch_members(addresses: Sequence[str], *, timeout_s: float) -> list[MemberLoad] | None:
    """The members at this moment, by the first of the directories that answers; None if none does."""
    workers = watch_workers(addresses, timeout_s=timeout_s)
    return None if workers is None else [_load(worker) for worker in workers]


def watch_workers(addresses: Sequence[str], *, timeout_s: float) -> list[worker_pb2.WorkerDescription] | None:
    """As `fetch_members`, with all that the directory says of them."""
    for address in addresses:
        workers = _watch(address, timeout_s=timeout_s)
        if workers is not None:
            return workers
    return None


def _watch(address: str, *, timeout_s: float) -> list[worker_pb2.WorkerDescription] | None:
    members: list[worker_pb2.WorkerDescription] = []
    with grpc.insecure_channel(address) as channel:
        events = directory_pb2_grpc.DirectoryStub(channel).Watch(
            directory_pb2.WatchRequest(), timeout=timeout_s
        )
        try:
            for event in events:
                if event.kind == directory_pb2.WatchEvent.SYNCED:
                    return members
                members.append(event.worker)
        except grpc.RpcError:
            return None
        finally:
            events.cancel()  # type: ignore[no-untyped-call]
    return None


def _load(worker: worker_pb2.WorkerDescription) -> MemberLoad:
    load = worker.load
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
        num_demanded_pages=load.num_demanded_pages,
        is_draining=worker.is_draining,
    )
