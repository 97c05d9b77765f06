"""The directory as a gRPC service, and the clock that lets silent workers go."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import grpc
from grpc.aio import ServicerContext

from control_plane.directory import wire
from control_plane.directory.block_events import BlockEvents
from control_plane.directory.errors import StaleEpoch, UnknownWorker
from control_plane.directory.member import Incarnation, Member, WorkerId, WorkerLoad
from control_plane.directory.memory import Change, ChangeKind, Listener
from kvstore.blocks import FORMAT_VERSION
from protos import directory_pb2, directory_pb2_grpc

# A watcher that lags so many changes behind is cut off; it watches again and starts from the present members.
MAX_QUEUED_CHANGES = 1024
# Silence is noticed this much later than `ttl_s` at worst, as a share of it.
EXPIRY_CHECKS_PER_TTL = 8
# Workers report at least twice in `ttl_s`, so only a check that is later than this share of it finds living ones
# silent. What they have sent meanwhile waits in our sockets and is read within the second share.
STALL_PER_TTL = 0.5
READ_TIME_PER_TTL = 0.25
# A heartbeat may bring 100,000 blocks; so many take the event loop for less than 1 ms.
BLOCKS_AT_A_TIME = 512

# Workers ping an idle connection every second; without these options gRPC takes that for an attack.
SERVER_OPTIONS = (
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),  # or two control processes could share one port without noticing
)

_STATUSES: dict[type[Exception], grpc.StatusCode] = {
    UnknownWorker: grpc.StatusCode.NOT_FOUND,
    StaleEpoch: grpc.StatusCode.FAILED_PRECONDITION,
    ValueError: grpc.StatusCode.INVALID_ARGUMENT,
}

_Context = ServicerContext[Any, Any]

_log = logging.getLogger(__name__)


class Directory(Protocol):
    """Soft state about all workers: `memory.MemoryDirectory`, alone or shared with others by `redis_directory`.

    No method waits, and all are called from one event loop; they raise as those of `MemoryDirectory` do.
    """

    @property
    def ttl_s(self) -> float: ...

    def members(self) -> tuple[Member, ...]: ...

    def stores_for(self, worker_id: WorkerId) -> tuple[Member, ...]: ...

    def register(self, member: Member, *, now_s: float) -> None: ...

    def heartbeat(
        self, incarnation: Incarnation, *, load: WorkerLoad, blocks: BlockEvents | None, now_s: float
    ) -> bool: ...

    def deregister(self, incarnation: Incarnation) -> None: ...

    def expire(self, *, now_s: float) -> tuple[Member, ...]: ...

    def postpone_expiry(self, *, until_s: float) -> None: ...

    def subscribe(self, listener: Listener) -> Callable[[], None]: ...


class DirectoryServicer(directory_pb2_grpc.DirectoryServicer):
    """Adapter of a `Directory`; the event loop that serves it is the only one that touches it."""

    def __init__(
        self,
        directory: Directory,
        *,
        heartbeat_s: float,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = directory
        self._heartbeat_s = heartbeat_s
        self._now_s = now_s

    async def Register(
        self,
        request: directory_pb2.RegisterRequest,
        context: _Context,
    ) -> directory_pb2.RegisterReply:
        try:
            self._directory.register(wire.read_member(request.worker), now_s=self._now_s())
        except (StaleEpoch, ValueError) as error:
            await _refuse(context, error)
        return directory_pb2.RegisterReply(heartbeat_s=self._heartbeat_s, ttl_s=self._directory.ttl_s)

    async def Heartbeat(
        self,
        request: directory_pb2.HeartbeatRequest,
        context: _Context,
    ) -> directory_pb2.HeartbeatReply:
        resend = False
        try:
            blocks = wire.read_blocks(request)
            for part in blocks.parts(BLOCKS_AT_A_TIME) if blocks is not None else (None,):
                resend |= self._directory.heartbeat(
                    wire.read_incarnation(request),
                    load=wire.read_load(request.load),
                    blocks=part,
                    now_s=self._now_s(),
                )
                await asyncio.sleep(0)
        except (StaleEpoch, UnknownWorker, ValueError) as error:
            await _refuse(context, error)
        stores = self._directory.stores_for(WorkerId(request.worker_id))
        return directory_pb2.HeartbeatReply(
            resend_blocks=resend, stores=[wire.write_store(store) for store in stores]
        )

    async def Deregister(
        self,
        request: directory_pb2.DeregisterRequest,
        context: _Context,
    ) -> directory_pb2.DeregisterReply:
        try:
            self._directory.deregister(wire.read_incarnation(request))
        except StaleEpoch as error:
            await _refuse(context, error)
        return directory_pb2.DeregisterReply()

    async def Watch(
        self,
        request: directory_pb2.WatchRequest,
        context: _Context,
    ) -> AsyncIterator[directory_pb2.WatchEvent]:
        """The present members as JOINED, then SYNCED, then changes. RESOURCE_EXHAUSTED: too slow, again."""
        changes = _BoundedChanges()
        # Subscribed before the first message goes out: what happens meanwhile is queued behind the members.
        members = self._directory.members()
        end = self._directory.subscribe(changes.put)
        try:
            for member in members:
                yield directory_pb2.WatchEvent(
                    kind=directory_pb2.WatchEvent.JOINED, worker=wire.write_member(member)
                )
            yield directory_pb2.WatchEvent(kind=directory_pb2.WatchEvent.SYNCED)
            while (change := await changes.get()) is not None:
                yield wire.write_change(change)
        finally:
            end()
        await context.abort(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"{MAX_QUEUED_CHANGES} changes were waiting for this watcher; watch again",
        )


class _BoundedChanges:
    """A queue that ends instead of growing."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Change] = asyncio.Queue(MAX_QUEUED_CHANGES)
        self._has_overflown = False

    def put(self, change: Change) -> None:
        try:
            self._queue.put_nowait(change)
        except asyncio.QueueFull:
            self._has_overflown = True

    async def get(self) -> Change | None:
        """None: changes were lost."""
        return None if self._has_overflown else await self._queue.get()


def warn_of_other_formats(change: Change) -> None:
    """A listener: a worker whose blocks have other names computes everything itself, and somebody should know."""
    member = change.member
    if change.kind is ChangeKind.JOINED and not member.has_our_blocks:
        fields = {
            "worker_id": member.worker_id,
            "epoch": member.epoch,
            "block_format": member.block_format.decode(errors="replace"),
            "expected": FORMAT_VERSION.decode(),
        }
        _log.warning("block_format_mismatch", extra={"fields": fields})


async def expire_silent(directory: Directory, *, now_s: Callable[[], float] = time.monotonic) -> None:
    """Runs until cancelled."""
    interval_s = directory.ttl_s / EXPIRY_CHECKS_PER_TTL
    checked_s = now_s()
    while True:
        await asyncio.sleep(interval_s)
        last_s, checked_s = checked_s, now_s()
        if checked_s - last_s - interval_s > STALL_PER_TTL * directory.ttl_s:
            # This process was frozen or starved.
            directory.postpone_expiry(until_s=checked_s + READ_TIME_PER_TTL * directory.ttl_s)
        for member in directory.expire(now_s=checked_s):
            fields = {"worker_id": member.worker_id, "epoch": member.epoch, "ttl_s": directory.ttl_s}
            _log.warning("worker_silent", extra={"fields": fields})


async def _refuse(context: _Context, error: Exception) -> None:
    await context.abort(_STATUSES[type(error)], str(error))
