"""The source's side of a pull by key: which blocks a ticket is for, and chunks of them as they are wanted.

A ticket pins nothing. Each want pins its own blocks while it is encoded, so a puller that dawdles costs nothing, and
one that comes when its blocks are gone is told so. What was encoded is kept for a while: contexts are coded once.
"""

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvstore.block_stream import RAW_LEVEL, Want, receive_want
from kvstore.blocks import BlockKey
from kvstore.codec.codec import KvCodec
from kvstore.coded_chunks import CodedChunks
from kvstore.data_plane import Connection, SealedFrame
from kvstore.errors import TransferError, TransferRefused
from kvstore.frames import FrameKind
from kvstore.store import BlockStore
from kvstore.tiers.tier import Tier
from kvstore.transfer import MIN_KEEP_ALIVE_S, TICKET_BYTES, refuse, send_payload
from workers.chunk_frames import ChunkFrames
from workers.kv_metrics import KvMetrics
from workers.sending_room import SendingRoom

# Chunks of one connection that are encoded at a time, or lie in memory until the link has taken those before them.
MAX_CODING = 3

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
    coded_bytes: int = 16 * 2**20  # of chunks that are kept coded
    sending_bytes: int = 256 * 2**20  # of chunks on their way, to all pullers together
    room_s: float = 2.0  # how long one waits for room among those
    total_s: float = 60.0  # of one pull, however slowly its puller takes it
    max_ticket_blocks: int = 2**20  # of all tickets that are not used yet: 60 MB

    def __post_init__(self) -> None:
        if self.keep_alive_s < MIN_KEEP_ALIVE_S:
            raise ValueError(f"keep_alive_s must be at least {MIN_KEEP_ALIVE_S}, got {self.keep_alive_s}")
        for name in ("ticket_s", "max_tickets", "num_threads", "sending_bytes", "room_s", "total_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.coded_bytes < 0:
            raise ValueError(f"coded_bytes must not be negative, got {self.coded_bytes}")


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
        self,
        store: BlockStore,
        *,
        codec: KvCodec,
        metrics: KvMetrics,
        limits: BlockExportLimits = BlockExportLimits(),
    ) -> None:
        self._store = store
        self._codec = codec
        self._limits = limits
        self._tickets: OrderedDict[bytes, _Ticket] = OrderedDict()  # the next to be void comes first
        self._threads = ThreadPoolExecutor(limits.num_threads, thread_name_prefix="encode")
        self._chunks = ChunkFrames(
            store,
            codec=codec,
            coded=CodedChunks(capacity_bytes=limits.coded_bytes),
            metrics=metrics,
            threads=self._threads,
        )
        self._room = SendingRoom(capacity_bytes=limits.sending_bytes, wait_s=limits.room_s)

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
        num_blocks = sum(len(ticket.keys) for ticket in self._tickets.values())
        if num_blocks + len(tiers) > self._limits.max_ticket_blocks:
            raise TooManyTickets(
                f"{num_blocks} blocks have tickets not used yet, {len(tiers)} more are too many"
            )
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
        stream = _Stream(connection, issued, self._chunks, self._room)
        try:
            async with asyncio.timeout(self._limits.total_s):
                await stream.run(keep_alive_s=self._limits.keep_alive_s)
        except* (TransferError, TimeoutError) as errors:
            logger.debug("pull of %d blocks ended: %s", len(issued.keys), errors.exceptions)
        return True

    def drop_coded(self) -> None:
        """Blocks were dropped from the store: nothing coded of them is sent any more."""
        self._chunks.coded.drop()

    def close(self) -> None:
        self._tickets.clear()
        self._threads.shutdown()

    def _forget_void(self) -> None:
        now_s = asyncio.get_running_loop().time()
        while self._tickets and next(iter(self._tickets.values())).void_after_s < now_s:
            self._tickets.popitem(last=False)


class _Stream:
    """One connection: wants are read and encoded while the chunks before them are sent, in the order of the wants."""

    def __init__(
        self, connection: Connection, ticket: _Ticket, chunks: ChunkFrames, room: SendingRoom
    ) -> None:
        self._connection = connection
        self._ticket = ticket
        self._chunks = chunks
        self._room = room
        self._num_bytes = 0  # of the room
        # With the one that is sent and the one that waits for room: MAX_CODING are coded or wait for the link.
        self._coding: asyncio.Queue[asyncio.Task[SealedFrame | TransferRefused]]
        self._coding = asyncio.Queue(MAX_CODING - 2)

    async def run(self, *, keep_alive_s: float) -> None:
        """Until an ExceptionGroup says why it ended: the puller left or lied, or we had to refuse."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(tasks))
                tasks.create_task(self._send(keep_alive_s=keep_alive_s))
        finally:
            self._give(self._num_bytes)

    async def _read(self, tasks: asyncio.TaskGroup) -> None:
        num_blocks, block_bytes = len(self._ticket.keys), self._chunks.codec.layout.block_bytes
        while True:
            want = await receive_want(self._connection, num_blocks=num_blocks, block_bytes=block_bytes)
            await self._coding.put(tasks.create_task(self._code(want)))

    async def _send(self, *, keep_alive_s: float) -> None:
        while True:
            coding = await self._coding.get()
            while not (await asyncio.wait({coding}, timeout=keep_alive_s))[0]:
                await send_payload(self._connection, FrameKind.KEEP_ALIVE, b"")
            chunk = coding.result()
            if isinstance(chunk, TransferRefused):
                await refuse(self._connection, str(chunk))
                raise chunk
            await self._connection.send_sealed(chunk)
            self._give(len(chunk.payload))

    async def _code(self, want: Want) -> SealedFrame | TransferRefused:
        """A refusal is no exception here: the chunks before it are still to be sent."""
        num_levels = len(self._chunks.codec.levels) if self._ticket.may_code else RAW_LEVEL + 1
        if want.level >= num_levels:
            return TransferRefused(f"level {want.level} cannot be had, only those below {num_levels}")
        keys = self._ticket.keys[want.first_block : want.first_block + want.num_blocks]
        raw_bytes = want.num_blocks * self._chunks.codec.layout.block_bytes
        try:
            await self._room.take(raw_bytes)
            self._num_bytes += raw_bytes
            chunk = await self._chunks.make(want, keys)
        except TransferRefused as refusal:
            return refusal
        self._give(raw_bytes - len(chunk.payload))
        return chunk

    def _give(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes
        self._room.give(num_bytes)
