"""Keeps this worker known to the directory: registers, heartbeats with load and block events, says goodbye.

The directory is soft state. Whenever it was away, restarted or lost count, the worker registers anew and
sends all it holds; no failure of the directory ever disturbs the requests in flight. Where several processes serve
one directory, a worker talks to one of them and to the next as soon as that one is away.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Sequence

import grpc

from kvstore.holdings import HoldingChanges, Holdings
from kvstore.tiers.tier import Tier
from protos import directory_pb2, directory_pb2_grpc, worker_pb2
from workers.grpc_options import CHANNEL_OPTIONS
from workers.logs import log_event
from workers.offers import StoreAddress
from workers.reports import BlockEvents

RPC_TIMEOUT_S = 1.0
GOODBYE_TIMEOUT_S = 0.5
ANNOUNCE_TIMEOUT_S = 1.0
FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0
# Another process may serve the directory: it is asked at once, but not by all workers in the same moment.
FAIL_OVER_S = 0.05
# What one heartbeat carries at most: to find them holds the event loop for 1 to 2 ms. The rest follows at once.
MAX_KEYS_PER_HEARTBEAT = 2**11

_logger = logging.getLogger(__name__)
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class BlockReport:
    """What the directory has yet to hear about our blocks, in portions that fit into a heartbeat."""

    def __init__(self, holdings: Holdings, *, take_device_events: Callable[[], BlockEvents] | None) -> None:
        self._holdings = holdings
        self._take_device_events = take_device_events  # None: there are no device pages

    def restart(self) -> None:
        """The next `take` starts over with everything that is held."""
        self._holdings.restart()

    def take(self, *, max_keys: int) -> HoldingChanges:
        """The next changes, oldest first, which are forgotten here."""
        if self._take_device_events is not None:
            events = self._take_device_events()
            self._holdings.note(Tier.DEVICE, stored=events.stored, removed=events.removed)
        return self._holdings.take_changes(max_keys)

    @property
    def has_more(self) -> bool:
        return self._holdings.num_pending > 0


class Membership:
    """`run` for as long as the worker lives; cancelled, it deregisters on its way out.

    `directories` are gRPC targets that serve one directory. `on_stores` hears with every heartbeat which stores are
    there.
    """

    def __init__(
        self,
        directories: Sequence[str],
        *,
        describe: Callable[[], worker_pb2.WorkerDescription],
        blocks: BlockReport,
        on_stores: Callable[[Sequence[StoreAddress]], None],
    ) -> None:
        self._directories = directories
        self._describe = describe
        self._blocks = blocks
        self._on_stores = on_stores
        self._current = 0
        self._sequence = 0
        self._is_known = False
        self._num_away = 0  # tries in a row that no directory answered
        self._news = asyncio.Event()
        self._told = asyncio.Event()

    async def announce(self) -> None:
        """What the description says has changed, beside the load.

        Returns once the directory knows it and has said which stores there are now, or once it has not answered for a
        second time: where a whole cluster stops, it went first.
        """
        if self._nobody_listens:
            return
        self._told.clear()
        self._news.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANNOUNCE_TIMEOUT_S):
                await self._told.wait()

    @property
    def _nobody_listens(self) -> bool:
        return not self._directories or self._num_away > len(self._directories)

    async def run(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stubs = [
                directory_pb2_grpc.DirectoryStub(
                    await stack.enter_async_context(
                        grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
                    )
                )
                for target in self._directories
            ]
            try:
                await self._stay_registered(stubs)
            finally:
                # Even if we do not know that we are known: a registration may have been under way.
                await self._say_goodbye(stubs[self._current])

    async def _stay_registered(self, stubs: "Sequence[directory_pb2_grpc.DirectoryAsyncStub]") -> None:
        retry_s = FIRST_RETRY_S
        while True:
            stub = stubs[self._current]
            try:
                reply = await self._register(stub)
                self._is_known = True
                retry_s, self._num_away = FIRST_RETRY_S, 0
                log_event(_logger, "registered", directory=self._directories[self._current])
                await self._heartbeat(stub, every_s=reply.heartbeat_s)
            except grpc.aio.AioRpcError as error:
                self._log_failure(error)
                self._is_known = False
                if error.code() in _AWAY:
                    self._current = (self._current + 1) % len(stubs)
                    self._num_away += 1
                    if self._nobody_listens:
                        self._told.set()
            if 0 < self._num_away < len(stubs):
                await asyncio.sleep(random.uniform(0.0, FAIL_OVER_S))
                continue
            # Jitter, so that many workers do not fall upon a directory that has just come back.
            await asyncio.sleep(retry_s * random.uniform(0.5, 1.0))
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _register(self, stub: "directory_pb2_grpc.DirectoryAsyncStub") -> directory_pb2.RegisterReply:
        request = directory_pb2.RegisterRequest(worker=self._describe())
        return await stub.Register(request, timeout=RPC_TIMEOUT_S)

    def _log_failure(self, error: grpc.aio.AioRpcError) -> None:
        # A directory that is away is tried again and again; only the first time is news. One that answers no is.
        is_away = error.code() in _AWAY
        log_event(
            _logger,
            "directory_lost" if self._is_known else "directory_away" if is_away else "directory_refused",
            level=logging.DEBUG if is_away and not self._is_known else logging.WARNING,
            directory=self._directories[self._current],
            status=error.code().name,
            detail=error.details(),
        )

    async def _heartbeat(self, stub: "directory_pb2_grpc.DirectoryAsyncStub", *, every_s: float) -> None:
        """Until the directory does not answer or does not know us, which raises `AioRpcError`."""
        self._sequence = 0
        self._blocks.restart()
        while True:
            has_news = self._news.is_set()
            if has_news:
                await self._register(stub)
            pending = self._blocks.take(max_keys=MAX_KEYS_PER_HEARTBEAT)
            worker = self._describe()
            self._sequence += 1
            reply = await stub.Heartbeat(
                directory_pb2.HeartbeatRequest(
                    worker_id=worker.worker_id,
                    epoch=worker.epoch,
                    load=worker.load,
                    blocks=directory_pb2.BlockEvents(
                        sequence=self._sequence,
                        snapshot=pending.snapshot,
                        stored=b"".join(pending.stored),
                        stored_tiers=bytes(pending.tiers),
                        removed=b"".join(pending.removed),
                    ),
                ),
                timeout=RPC_TIMEOUT_S,
            )
            if reply.resend_blocks:
                self._blocks.restart()
            self._on_stores([_store_from_wire(store) for store in reply.stores])
            if has_news:
                self._news.clear()  # not before: news that did not arrive are told to the next directory
                self._told.set()
            if reply.resend_blocks or not self._blocks.has_more:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(every_s):
                        await self._news.wait()

    async def _say_goodbye(self, stub: "directory_pb2_grpc.DirectoryAsyncStub") -> None:
        worker = self._describe()
        # A directory that is away forgets us by itself.
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.Deregister(
                directory_pb2.DeregisterRequest(worker_id=worker.worker_id, epoch=worker.epoch),
                timeout=GOODBYE_TIMEOUT_S,
            )


def _store_from_wire(message: directory_pb2.StoreMember) -> StoreAddress:
    return StoreAddress(
        worker_id=message.worker_id, epoch=message.epoch, control_address=message.control_address
    )
