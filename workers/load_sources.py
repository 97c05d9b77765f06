"""Where chunks of a load come from: the tiers of this worker, or a peer. Asked for one after the other."""

import asyncio
import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Protocol

from kvstore.blocks import BLOCK_SIZE_TOKENS, BlockKey
from kvstore.codec.levels import RAW
from kvstore.store import PinnedBlocks, Reservation
from kvstore.stream_estimates import LinkEstimate
from kvstore.streaming import LevelCost
from kvstore.tiers.tier import BlockRun, Tier
from workers.errors import PullCorrupted
from workers.fetch import Fetch
from workers.load_parts import Arrived, LoadParts, Sources, filling
from workers.load_plan import Span
from workers.raw_blocks import copy_raw
from workers.request import PageId
from workers.threads import cancel_to_end, run_to_end


class BlocksMissing(Exception):
    """Blocks that were here when the load began are not any more, or the disk does not give them back."""


class LoadSource(Protocol):
    """Both raise what ends the load from here; cancelled, they hold nothing."""

    def levels(self) -> Sequence[LevelCost]: ...

    async def want(self, span: Span, cost: LevelCost) -> bool:
        """False: there is no room for it now."""

    async def receive(self) -> Arrived:
        """What was asked for first."""


class LocalSource:
    """The memory and the disk of this worker."""

    def __init__(self, keys: Sequence[BlockKey], *, parts: LoadParts, sources: Sources) -> None:
        self._keys = keys  # of the request
        self._parts = parts
        self._sources = sources
        self._wanted: deque[Span] = deque()

    def levels(self) -> Sequence[LevelCost]:
        return [cost for cost in self._sources.levels.costs() if cost.level == RAW]

    async def want(self, span: Span, cost: LevelCost) -> bool:
        self._wanted.append(span)
        return True

    async def receive(self) -> Arrived:
        span = self._wanted.popleft()
        began_s = time.monotonic()
        held = await self._parts.store.pin(self._keys[span.first_block : span.end_block])
        if len(held.slots) < span.num_blocks:
            held.close()
            raise BlocksMissing(f"{len(held.slots)} of {span.num_blocks} blocks are left")
        if Tier.DISK in held.tiers:
            now_s = time.monotonic()
            num_bytes = held.tiers.count(Tier.DISK) * self._parts.codec.layout.block_bytes
            self._sources.disk.received(num_bytes, receive_s=now_s - began_s, now_s=now_s)
        return Arrived(span=span, held=held, tier=max(held.tiers), is_exact=True)


@dataclass(frozen=True, slots=True)
class _Wanted:
    span: Span
    cost: LevelCost
    room: Reservation
    asked_s: float

    @property
    def num_tokens(self) -> int:
        return self.span.num_blocks * BLOCK_SIZE_TOKENS


class PeerSource:
    """One open pull. Raw chunks are exact, and this worker's from now on: they go to slots. Lossy ones are nobody's but
    the request's: they are decoded into its pages if it has them, else into slots that nobody else sees.

    While a chunk is decoded the next ones travel: at 1 Gbit/s one core takes as long for the one as the wire for the
    other.
    """

    def __init__(
        self,
        fetch: Fetch,
        chain: BlockRun,
        *,
        parts: LoadParts,
        sources: Sources,
        threads: Executor,
        link: LinkEstimate,
        pages_of: Callable[[Span], Sequence[PageId]],
    ) -> None:
        self._fetch = fetch
        self._chain = chain  # from the first block of the pull on
        self._pages_of = pages_of  # that wait for these blocks now
        self._parts = parts
        self._sources = sources
        self._threads = threads
        self._link = link
        self._coming: deque[tuple[_Wanted, asyncio.Task[Arrived]]] = deque()
        self._wire = asyncio.Lock()  # fair: chunks are received in the order in which they were asked for
        self._received_s = self._decoded_s = 0.0  # when that of the last chunk ended
        # What coded chunks kept us waiting before they came. Of this pull alone: the next one may find them coded.
        self._prepare_s_per_token = 0.0

    def levels(self) -> Sequence[LevelCost]:
        costs = self._sources.levels.costs()
        return [
            cost if cost.level == RAW else replace(cost, prepare_s_per_token=self._prepare_s_per_token)
            for cost in costs
            if cost.level == RAW or self._fetch.has_same_profile
        ]

    async def want(self, span: Span, cost: LevelCost) -> bool:
        room = self._parts.store.reserve(span.num_blocks)
        if room is None:
            return False
        wanted = _Wanted(span, cost, room, time.monotonic())
        try:
            await self._fetch.want(
                first_block=span.first_block - self._chain.first_position,
                num_blocks=span.num_blocks,
                level=cost.level,
            )
        except BaseException:
            room.close()
            raise
        self._coming.append((wanted, asyncio.create_task(self._bring(wanted))))
        return True

    async def receive(self) -> Arrived:
        arrived = await self._coming[0][1]
        del self._coming[0]
        return arrived

    async def aclose(self) -> None:
        """Gives back what was reserved for chunks that did not come. Idempotent."""
        try:
            await cancel_to_end([task for _, task in self._coming])
        finally:
            for wanted, task in self._coming:
                wanted.room.close()
                if not task.cancelled() and task.exception() is None:
                    task.result().held.close()
            self._coming.clear()

    async def _bring(self, wanted: _Wanted) -> Arrived:
        is_raw, is_in_pages = wanted.cost.level == RAW, False
        async with self._wire:
            payload = await self._receive(wanted)
            if is_raw:
                # The largest chunks, and the fastest to unpack: no second one is in memory meanwhile.
                await self._unpack_raw(payload, wanted)
        if not is_raw:
            is_in_pages = await self._decode(payload, wanted)
        level = self._parts.codec.levels[wanted.cost.level]
        raw_bytes = wanted.span.num_blocks * self._parts.codec.layout.block_bytes
        self._parts.metrics.chunk(level.name, raw_bytes, len(payload))
        if is_raw:
            return await self._keep(wanted)
        return Arrived(
            span=wanted.span, held=wanted.room, tier=Tier.PEER, is_exact=False, is_in_pages=is_in_pages
        )

    async def _receive(self, wanted: _Wanted) -> memoryview:
        began_s = max(wanted.asked_s, self._received_s)
        try:
            chunk = await self._fetch.receive()
        except asyncio.CancelledError:
            # What is not here after so long is news too: the next load should not wait for it.
            now_s = time.monotonic()
            expected_bytes = int(wanted.cost.bytes_per_token * wanted.num_tokens)
            self._link.overdue(expected_bytes, waited_s=now_s - began_s, now_s=now_s)
            raise
        self._received_s = now_s = time.monotonic()
        waited_s = max(0.0, chunk.first_byte_s - began_s)
        receive_s = now_s - began_s - waited_s
        self._link.received(len(chunk.payload), receive_s=receive_s, waited_s=waited_s, now_s=now_s)
        if wanted.cost.level != RAW:
            self._prepare_s_per_token += 0.5 * (waited_s / wanted.num_tokens - self._prepare_s_per_token)
        return chunk.payload

    async def _unpack_raw(self, payload: memoryview, wanted: _Wanted) -> None:
        layout, slots = self._parts.codec.layout, wanted.room.slots
        expected_bytes = len(slots) * layout.block_bytes
        if len(payload) != expected_bytes:
            raise PullCorrupted(f"{len(slots)} raw blocks are {expected_bytes} bytes, got {len(payload)}")
        await self._unpack(
            payload, wanted, functools.partial(copy_raw, payload, self._parts.store.arena_SX, slots, layout)
        )

    async def _decode(self, payload: memoryview, wanted: _Wanted) -> bool:
        """True: into the request's pages. A copy from slots would be as long a way through memory again."""
        parts = self._parts
        page_ids = self._pages_of(wanted.span)
        if len(page_ids) < wanted.span.num_blocks:
            decode = functools.partial(parts.codec.decode, payload, parts.store.arena_SX, wanted.room.slots)
            await self._unpack(payload, wanted, decode)
            return False
        wanted.room.close()
        with filling(parts.state, page_ids):
            decode = functools.partial(parts.codec.decode, payload)
            fill = functools.partial(parts.kv_pool.fill, page_ids, decode)
            await self._unpack(payload, wanted, fill)
        return True

    async def _unpack(self, payload: memoryview, wanted: _Wanted, work: Callable[[], None]) -> None:
        began_s = time.monotonic()
        await run_to_end(self._threads, work)
        # Of two that are decoded at a time, each counts for what it adds: that is how fast decoding goes on.
        began_s, self._decoded_s = max(began_s, self._decoded_s), time.monotonic()
        self._sources.levels.observe(
            wanted.cost.level,
            num_tokens=wanted.num_tokens,
            coded_bytes=len(payload),
            seconds={"decode": self._decoded_s - began_s},
        )

    async def _keep(self, wanted: _Wanted) -> Arrived:
        """Commits raw blocks, and pins them before anybody can take their slots."""
        start = wanted.span.first_block - self._chain.first_position
        run = self._chain.part(start, start + wanted.span.num_blocks)
        with wanted.room as room:
            room.commit(run, slots=room.slots)
        held: PinnedBlocks = await self._parts.store.pin(run.keys)
        if len(held.slots) < wanted.span.num_blocks:
            held.close()
            raise BlocksMissing(f"{len(held.slots)} of {wanted.span.num_blocks} fetched blocks are left")
        return Arrived(span=wanted.span, held=held, tier=Tier.PEER, is_exact=True)
