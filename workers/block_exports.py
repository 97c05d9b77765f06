"""The source's side of a pull by key: which blocks a ticket is for, and chunks of them as they are wanted.

A ticket pins nothing. Each want pins its own blocks while it is encoded, so a puller that dawdles costs nothing, and
one that comes when its blocks are gone is told so.
"""

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvstore.block_stream import MAX_OUTSTANDING_WANTS, RAW_LEVEL, Want, receive_want, seal_chunk
from kvstore.blocks import BlockKey
from kvstore.codec.codec import KvCodec
from kvstore.data_plane import Connection, SealedFrame
from kvstore.errors import TransferError, TransferRefused
from kvstore.frames import FrameKind
from kvstore.store import BlockStore
from kvstore.tiers.tier import Tier
from kvstore.transfer import MIN_KEEP_ALIVE_S, TICKET_BYTES, refuse, send_payload
from workers.threads import run_to_end

logger = logging.getLogger(__name__)


class NotHeld(Exception):
    """Not even the first of these blocks is in memory or on disk."""


class TooManyTickets(Exception):
    """So many are issued and not used yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockExportLimits:
    ticket_s: float = 5.0  # a ticket that is not used for so long is void
    max_tickets: int = 1024
    keep_alive_s: float = 1.0  # how often a puller hears from a source that still encodes
    num_threads: int = 2  # that encode, beside those that compute

    def __post_init__(self) -> None:
        if self.keep_alive_s < MIN_KEEP_ALIVE_S:
            raise ValueError(f"keep_alive_s must be at least {MIN_KEEP_ALIVE_S}, got {self.keep_alive_s}")
        for name in ("ticket_s", "max_tickets", "num_threads"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class IssuedBlocks:
    ticket: bytes
    tiers: tuple[Tier, ...]  # of the leading blocks that are held


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ticket:
    keys: tuple[BlockKey, ...]
    may_code: bool  # both ends have the same profile
    void_after_s: float


class BlockExports:
    """All methods run in the thread of the event loop. `close` when no connection is served any more."""

    def __init__(
        self, store: BlockStore, *, codec: KvCodec, limits: BlockExportLimits = BlockExportLimits()
    ) -> None:
        self._store = store
        self._codec = codec
        self._limits = limits
        self._tickets: OrderedDict[bytes, _Ticket] = OrderedDict()  # the next to be void comes first
        self._threads = ThreadPoolExecutor(limits.num_threads, thread_name_prefix="encode")

    @property
    def codec_profile(self) -> bytes:
        return self._codec.profile_id

    @property
    def num_tickets(self) -> int:
        self._forget_void()
        return len(self._tickets)

    def issue_ticket(self, keys: Sequence[BlockKey], *, codec_profile: bytes) -> IssuedBlocks:
        """A ticket for the leading blocks that are held. Raises NotHeld, TooManyTickets."""
        if self.num_tickets >= self._limits.max_tickets:
            raise TooManyTickets(f"{self.num_tickets} tickets are not used yet, the most this worker issues")
        tiers = self._store.lookup(keys)
        if not tiers:
            raise NotHeld(f"block {keys[0].hex()} is not held here")
        ticket = secrets.token_bytes(TICKET_BYTES)
        self._tickets[ticket] = _Ticket(
            keys=tuple(keys[: len(tiers)]),
            may_code=codec_profile == self.codec_profile,
            void_after_s=asyncio.get_running_loop().time() + self._limits.ticket_s,
        )
        return IssuedBlocks(ticket=ticket, tiers=tiers)

    async def serve(self, connection: Connection, ticket: bytes) -> bool:
        """Sends what is wanted until the puller leaves. False, at once, if the ticket is none of ours."""
        self._forget_void()
        issued = self._tickets.pop(ticket, None)
        if issued is None:
            return False
        try:
            await _Stream(connection, issued, self._store, self._codec, self._threads).run(
                keep_alive_s=self._limits.keep_alive_s
            )
        except* TransferError as errors:
            logger.debug("pull of %d blocks ended: %s", len(issued.keys), errors.exceptions)
        return True

    def close(self) -> None:
        self._tickets.clear()
        self._threads.shutdown()

    def _forget_void(self) -> None:
        now_s = asyncio.get_running_loop().time()
        while self._tickets and next(iter(self._tickets.values())).void_after_s < now_s:
            self._tickets.popitem(last=False)


class _Stream:
    """One connection: a task reads wants, one encodes, one sends, so that all three overlap."""

    def __init__(
        self, connection: Connection, ticket: _Ticket, store: BlockStore, codec: KvCodec, threads: Executor
    ) -> None:
        self._connection = connection
        self._ticket = ticket
        self._store = store
        self._codec = codec
        self._threads = threads
        self._wants: asyncio.Queue[Want] = asyncio.Queue(MAX_OUTSTANDING_WANTS)
        self._chunks: asyncio.Queue[SealedFrame | TransferRefused] = asyncio.Queue(1)
        self._num_unanswered = 0

    async def run(self, *, keep_alive_s: float) -> None:
        """Until an ExceptionGroup says why it ended: the puller left or lied, or we had to refuse."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read())
            tasks.create_task(self._encode())
            tasks.create_task(self._send(keep_alive_s=keep_alive_s))

    async def _read(self) -> None:
        num_blocks, block_bytes = len(self._ticket.keys), self._codec.layout.block_bytes
        while True:
            want = await receive_want(self._connection, num_blocks=num_blocks, block_bytes=block_bytes)
            self._num_unanswered += 1
            await self._wants.put(want)

    async def _encode(self) -> None:
        while True:
            want = await self._wants.get()
            try:
                await self._chunks.put(await self._chunk(want))
            except TransferRefused as refusal:
                await self._chunks.put(refusal)

    async def _send(self, *, keep_alive_s: float) -> None:
        while True:
            try:
                async with asyncio.timeout(keep_alive_s):
                    chunk = await self._chunks.get()
            except TimeoutError:
                if self._num_unanswered > 0:
                    await send_payload(self._connection, FrameKind.KEEP_ALIVE, b"")
                continue
            if isinstance(chunk, TransferRefused):
                await refuse(self._connection, str(chunk))
                raise chunk
            await self._connection.send_sealed(chunk)
            self._num_unanswered -= 1

    async def _chunk(self, want: Want) -> SealedFrame:
        num_levels = len(self._codec.levels) if self._ticket.may_code else RAW_LEVEL + 1
        if want.level >= num_levels:
            raise TransferRefused(f"level {want.level} cannot be had, only those below {num_levels}")
        end_block = want.first_block + want.num_blocks
        with await self._store.pin(self._ticket.keys[want.first_block : end_block]) as pinned:
            if len(pinned.slots) < want.num_blocks:
                raise TransferRefused(f"block {want.first_block + len(pinned.slots)} is not held any more")
            return await run_to_end(self._threads, partial(self._seal, want, pinned.slots))

    def _seal(self, want: Want, slots: Sequence[int]) -> SealedFrame:
        """In a thread."""
        arena_SX = self._store.arena_SX
        if want.level == RAW_LEVEL:
            # Not arena_SX[slots]: that took 193 ms for 32 MiB on one of two busy cores, this 13.
            raw_NX = np.empty((len(slots), arena_SX.shape[1]), np.uint8)
            np.take(arena_SX, slots, axis=0, out=raw_NX, mode="clip")
            return seal_chunk(want, raw_NX.reshape(-1).data)
        return seal_chunk(want, memoryview(self._codec.encode(arena_SX, slots, level=want.level)))
