"""Keeps this worker known to the directory: registers, heartbeats with load and block events, says goodbye.

The directory is soft state. Whenever it was away, restarted or lost count, the worker registers anew and
sends all it holds; no failure of the directory ever disturbs the requests in flight.
"""

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from kvstore.blocks import BlockKey
from protos import directory_pb2, directory_pb2_grpc, worker_pb2
from workers.grpc_options import CHANNEL_OPTIONS
from workers.logs import log_event
from workers.state import EngineState

RPC_TIMEOUT_S = 1.0
GOODBYE_TIMEOUT_S = 0.5
FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0
# What one heartbeat carries at most: 2 MiB, half of what gRPC accepts. The rest goes with the next one.
MAX_KEYS_PER_HEARTBEAT = 2**17

_logger = logging.getLogger(__name__)
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingBlocks:
    """Block events of one heartbeat. `snapshot`: void what was known before."""

    snapshot: bool = False
    stored: tuple[BlockKey, ...] = ()
    removed: tuple[BlockKey, ...] = ()


class BlockReport:
    """What the directory has yet to hear about our blocks, in portions that fit into a heartbeat."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._changes: dict[BlockKey, bool] = {}
        self._restart = True

    def restart(self) -> None:
        """The next `take` starts over with everything that is held."""
        self._restart = True

    def take(self, *, max_keys: int) -> PendingBlocks:
        """The next changes, oldest first, which are forgotten here."""
        snapshot, self._restart = self._restart, False
        if snapshot:
            self._changes = dict.fromkeys(self._state.take_block_snapshot(), True)
        else:
            events = self._state.take_block_events()
            self._changes.update(dict.fromkeys(events.removed, False))
            self._changes.update(dict.fromkeys(events.stored, True))
        taken = list(itertools.islice(self._changes.items(), max_keys))
        for key, _ in taken:
            del self._changes[key]
        return PendingBlocks(
            snapshot=snapshot,
            stored=tuple(key for key, is_stored in taken if is_stored),
            removed=tuple(key for key, is_stored in taken if not is_stored),
        )


class Membership:
    """`run` for as long as the worker lives; cancelled, it deregisters on its way out."""

    def __init__(
        self,
        directory: str,
        *,
        describe: Callable[[], worker_pb2.WorkerDescription],
        blocks: BlockReport,
    ) -> None:
        self._directory = directory
        self._describe = describe
        self._blocks = blocks
        self._sequence = 0
        self._is_known = False

    async def run(self) -> None:
        async with grpc.aio.insecure_channel(self._directory, options=CHANNEL_OPTIONS) as channel:
            stub = directory_pb2_grpc.DirectoryStub(channel)
            try:
                await self._stay_registered(stub)
            finally:
                # Even if we do not know that we are known: a registration may have been under way.
                await self._say_goodbye(stub)

    async def _stay_registered(self, stub: "directory_pb2_grpc.DirectoryAsyncStub") -> None:
        retry_s = FIRST_RETRY_S
        while True:
            try:
                reply = await stub.Register(
                    directory_pb2.RegisterRequest(worker=self._describe()), timeout=RPC_TIMEOUT_S
                )
                self._is_known = True
                retry_s = FIRST_RETRY_S
                log_event(_logger, "registered", directory=self._directory)
                await self._heartbeat(stub, every_s=reply.heartbeat_s)
            except grpc.aio.AioRpcError as error:
                self._log_failure(error)
                self._is_known = False
            # Jitter, so that many workers do not fall upon a directory that has just come back.
            await asyncio.sleep(retry_s * random.uniform(0.5, 1.0))
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    def _log_failure(self, error: grpc.aio.AioRpcError) -> None:
        # A directory that is away is tried again and again; only the first time is news. One that answers no is.
        is_away = error.code() in _AWAY
        log_event(
            _logger,
            "directory_lost" if self._is_known else "directory_away" if is_away else "directory_refused",
            level=logging.DEBUG if is_away and not self._is_known else logging.WARNING,
            directory=self._directory,
            status=error.code().name,
            detail=error.details(),
        )

    async def _heartbeat(self, stub: "directory_pb2_grpc.DirectoryAsyncStub", *, every_s: float) -> None:
        """Until the directory does not answer or does not know us, which raises `AioRpcError`."""
        self._sequence = 0
        self._blocks.restart()
        while True:
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
                        removed=b"".join(pending.removed),
                    ),
                ),
                timeout=RPC_TIMEOUT_S,
            )
            if reply.resend_blocks:
                self._blocks.restart()
            await asyncio.sleep(every_s)

    async def _say_goodbye(self, stub: "directory_pb2_grpc.DirectoryAsyncStub") -> None:
        worker = self._describe()
        # A directory that is away forgets us by itself.
        with contextlib.suppress(grpc.aio.AioRpcError):
            await stub.Deregister(
                directory_pb2.DeregisterRequest(worker_id=worker.worker_id, epoch=worker.epoch),
                timeout=GOODBYE_TIMEOUT_S,
            )
