"""Asks every worker and store at once what its tiers hold, or to forget some of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc

from control_plane.cli.failures import CommandFailed
from control_plane.cli.members import watch_workers
from control_plane.runtimes.state import RunState
from kvstore.blocks import BlockKey, root_key
from protos import kv_pb2, kv_pb2_grpc, worker_pb2

_DIRECTORY_TIMEOUT_S = 2.0
_DESCRIBE_TIMEOUT_S = 5.0
_DROP_TIMEOUT_S = 60.0  # a worker erases its files before it answers

Worker = worker_pb2.WorkerDescription
Reply = TypeVar("Reply")


@dataclass(frozen=True, slots=True)
class Answer(Generic[Reply]):
    """Of one worker: its reply, or why there is none."""

    worker: Worker
    reply: Reply | None
    failure: str = ""


def find_workers(state: RunState) -> list[Worker]:
    """Every worker and store that the cluster knows, by name. Raises CommandFailed if no directory answers."""
    addresses = [gateway.directory_address for gateway in state.gateways]
    workers = watch_workers(addresses, timeout_s=_DIRECTORY_TIMEOUT_S)
    if workers is None:
        raise CommandFailed(
            f"no directory answers at {', '.join(addresses)}; penstock status shows who is there"
        )
    return sorted(workers, key=lambda worker: worker.worker_id)


def describe(workers: Sequence[Worker], *, num_prefixes: int) -> "list[Answer[kv_pb2.TiersDescription]]":
    request = kv_pb2.DescribeTiersRequest(num_prefixes=num_prefixes)
    return list(_ask_all(workers, "DescribeTiers", lambda worker: request, timeout_s=_DESCRIBE_TIMEOUT_S))


def drop(workers: Sequence[Worker], *, cache_salt: str | None) -> "list[Answer[kv_pb2.DropReply]]":
    """All blocks of a tenant, or just all. Each worker's root is its own: the key holds the model's fingerprint."""

    def request(worker: Worker) -> kv_pb2.DropRequest:
        root = BlockKey(b"")
        if cache_salt is not None:
            root = root_key(model_fingerprint=worker.model.fingerprint, cache_salt=cache_salt)
        return kv_pb2.DropRequest(source_epoch=worker.epoch, root=root)

    return list(_ask_all(workers, "Drop", request, timeout_s=_DROP_TIMEOUT_S))


def _ask_all(
    workers: Sequence[Worker], method: str, request: Callable[[Worker], Any], *, timeout_s: float
) -> Iterator[Answer[Any]]:
    with ExitStack() as channels:
        calls = []
        for worker in workers:
            channel = channels.enter_context(grpc.insecure_channel(worker.control_address))
            call = getattr(kv_pb2_grpc.KvTransferStub(channel), method)
            calls.append(call.future(request(worker), timeout=timeout_s))
        for worker, call in zip(workers, calls, strict=True):
            try:
                yield Answer(worker, call.result())
            except grpc.RpcError as e:
                yield Answer(worker, None, failure=f"{e.code().name.lower()}: {e.details()}")
