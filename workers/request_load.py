"""One request's load: blocks found in the tiers of this worker and at others, on their way into its pages.

    memory   one copy, claimed as a whole
    disk     chunk by chunk from the last to the first, as far as the plan says
    peers    likewise, from the first of them that answers, and from the next where that one breaks off

The three are regions of their own and come at the same time: into slots of the memory tier while the request waits, and
from there into its pages once it has some; what is coded is then decoded right into them. A chunk that does not come
ends its region: what came after it stays, what is before it is computed.
"""

import asyncio
import contextlib
import functools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from kvstore.blocks import BLOCK_SIZE_TOKENS, BlockKey
from kvstore.errors import CodecError
from kvstore.stream_estimates import LinkEstimate
from kvstore.streaming import LevelCost
from kvstore.tiers.tier import BlockRun
from workers.errors import PullError
from workers.load_parts import Arrived, LoadParts, Sources, filling
from workers.load_plan import Moment, Span, StreamPlanner, chunk_spans, compute_s
from workers.load_sources import BlocksMissing, LoadSource, LocalSource, PeerSource
from workers.messages import BlocksPlaced, LoadFailed
from workers.request import KvHolder, LoadRegion, PageId, Request, Status
from workers.threads import run_to_end


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Where the blocks of a request lie beyond the pages of this worker."""

    root: BlockKey
    keys: tuple[BlockKey, ...]  # of the blocks that may be loaded, from the first on
    first_block: int  # those before it are in pages
    memory_end: int
    local_end: int  # memory and disk
    holders: tuple[KvHolder, ...]  # of more than that, by what others say

    @property
    def end_block(self) -> int:
        hinted = max((holder.num_blocks for holder in self.holders), default=0)
        return min(max(self.local_end, hinted), len(self.keys))

    @property
    def is_worth_it(self) -> bool:
        return self.first_block < self.end_block

    def chain(self, first_block: int, end_block: int) -> BlockRun:
        return BlockRun(
            root=self.root,
            parent=self.keys[first_block - 1] if first_block else self.root,
            first_position=first_block,
            keys=self.keys[first_block:end_block],
        )


class RequestLoad:
    """Claims its regions when it is made, and works in `run`."""

    def __init__(self, request: Request, found: Found, *, parts: LoadParts, sources: Sources) -> None:
        self.request = request
        self.found = found
        self._parts = parts
        self._sources = sources
        self._started_s = time.monotonic()
        self._planners: list[StreamPlanner] = []  # that decided
        self._reached: dict[LoadRegion, int] = {}  # the first block that has come
        self._admitted = asyncio.Event()
        self._arrived: asyncio.Queue[tuple[LoadRegion, Arrived] | None]
        self._arrived = asyncio.Queue(parts.limits.max_ahead_chunks)
        self._memory = self._claim(found.first_block, found.memory_end)
        self._disk = self._claim(found.memory_end, found.local_end)
        self._peers = self._claim(found.local_end, found.end_block)

    def admit(self) -> None:
        """The request has pages."""
        self._admitted.set()

    def give_up(self) -> None:
        """What is not in pages does not come. After `run`, so that nothing writes where the engine computes next."""
        for region in (self._memory, self._disk, self._peers):
            if region is not None:
                self._parts.post(LoadFailed(self.request.request_id, region))

    def patience_s(self) -> float:
        """How long the request may wait for its next chunk: as long as computing that would take."""
        limits, region = self._parts.limits, self.request.loads[0]
        first_block = max(region.first_block, region.placed_block - limits.chunk_blocks)
        chunk_s = compute_s(self._parts.costs, first_block=first_block, end_block=region.placed_block)
        return max(chunk_s, limits.least_patience_s)

    def regret_s(self) -> float | None:
        """How much sooner the prompt would have been there with another choice; None: there was none."""
        now_s, levels = time.monotonic(), self._sources.levels.costs()
        found = [p.regret_s(now_s - self._started_s, levels, now_s=now_s) for p in self._planners]
        return max(found, default=None)

    async def run(self, threads: Executor) -> None:
        """Returns when all that comes is in pages. Cancelled, it leaves no slot, pin, page or connection behind."""
        try:
            async with asyncio.timeout(self._parts.limits.timeout_s), asyncio.TaskGroup() as group:
                group.create_task(self._bring_all(threads))
                group.create_task(self._place_all(threads))
        finally:
            while not self._arrived.empty():
                if (entry := self._arrived.get_nowait()) is not None:
                    entry[1].held.close()

    # Into slots.

    async def _bring_all(self, threads: Executor) -> None:
        async with asyncio.TaskGroup() as group:
            if self._memory is not None:
                group.create_task(self._bring(self._memory, self._bring_memory))
            if self._disk is not None:
                group.create_task(self._bring(self._disk, self._bring_disk))
            if self._peers is not None:
                from_peers = functools.partial(self._bring_from_peers, threads)
                group.create_task(self._bring(self._peers, from_peers))
        await self._arrived.put(None)

    async def _bring(self, region: LoadRegion, bring: Callable[[LoadRegion], Awaitable[None]]) -> None:
        try:
            await bring(region)
        except (PullError, CodecError, BlocksMissing) as error:
            self._parts.metrics.load_failed(type(error).__name__)
            self._stop(region, self._reached.get(region, region.end_block))

    async def _bring_memory(self, region: LoadRegion) -> None:
        if region not in self.request.loads:
            return  # pages had all of it when the request was admitted
        source = LocalSource(self.found.keys, parts=self._parts, sources=self._sources)
        [raw] = source.levels()
        await source.want(Span(region.first_block, region.end_block), raw)
        await self._deliver(region, await source.receive())

    async def _bring_disk(self, region: LoadRegion) -> None:
        source = LocalSource(self.found.keys, parts=self._parts, sources=self._sources)
        await self._stream(
            region, source, self._plan_for(Span(region.first_block, region.end_block), self._sources.disk)
        )

    async def _bring_from_peers(self, threads: Executor, region: LoadRegion) -> None:
        """From the first holder that answers; where it breaks off or lies, the next one goes on."""
        first_block = region.first_block
        for holder in self.found.holders:
            blocks = Span(first_block, self._reached.get(region, region.end_block))
            try:
                if await self._bring_from(holder, region, blocks, threads=threads):
                    return
            except (PullError, CodecError) as error:
                self._parts.metrics.load_failed(type(error).__name__)
        self._stop(region, self._reached.get(region, region.end_block))

    async def _bring_from(
        self, holder: KvHolder, region: LoadRegion, blocks: Span, *, threads: Executor
    ) -> bool:
        """Brings what the plan says of these blocks, the last ones missing. False: the holder lacks some of those."""
        link = self._sources.peer(holder.control_address)
        planner = self._plan_for(blocks, link)
        if self._next_level(region, planner, self._sources.levels.costs()) is None:
            return True
        chain = self.found.chain(blocks.first_block, blocks.end_block)
        began_s = time.monotonic()
        async with await self._parts.fetcher.open(holder, chain.keys) as fetch:
            link.answered((time.monotonic() - began_s) / 2)  # a call, then a connection
            if fetch.num_blocks < blocks.num_blocks:
                if region in self._reached:
                    return False
                end_block = blocks.first_block + fetch.num_blocks
                self._parts.state.loads.shorten(self.request.request_id, region, end_block)
                planner = self._plan_for(Span(blocks.first_block, end_block), link)
            source = PeerSource(
                fetch, chain, parts=self._parts, sources=self._sources, threads=threads, link=link,
                pages_of=functools.partial(self._pages_of, region),
            )  # fmt: skip
            async with contextlib.aclosing(source):
                await self._stream(region, source, planner)
        return True

    async def _stream(self, region: LoadRegion, source: LoadSource, planner: StreamPlanner) -> None:
        """From the last chunk towards the front, with the next one under way, until the rest is better computed."""
        outstanding: deque[tuple[Span, LevelCost]] = deque()
        while True:
            while len(outstanding) < self._parts.limits.max_outstanding:
                cost = self._next_level(region, planner, source.levels())
                if cost is None or not await source.want(planner.next_span, cost):
                    break
                outstanding.append((planner.next_span, cost))
                planner.asked(cost)
            if not outstanding:
                break
            arrived = await source.receive()
            planner.came(outstanding.popleft()[1], arrived.span)
            await self._deliver(region, arrived)
        self._move(region, self._reached.get(region, region.end_block))

    async def _deliver(self, region: LoadRegion, arrived: Arrived) -> None:
        self._reached[region] = arrived.span.first_block
        try:
            await self._arrived.put((region, arrived))
        except BaseException:
            arrived.held.close()
            raise

    # Into pages.

    async def _place_all(self, threads: Executor) -> None:
        await self._admitted.wait()
        while (entry := await self._arrived.get()) is not None:
            region, arrived = entry
            with arrived.held:
                await self._place(region, arrived, threads)

    async def _place(self, region: LoadRegion, arrived: Arrived, threads: Executor) -> None:
        parts, request_id, span = self._parts, self.request.request_id, arrived.span
        page_ids = self._pages_of(region, span)
        if not page_ids:
            return
        if not arrived.is_in_pages:
            slots = arrived.held.slots[-len(page_ids) :]
            with filling(parts.state, page_ids):
                copy = functools.partial(parts.kv_pool.load, page_ids, parts.store.arena_SX, slots)
                await run_to_end(threads, copy)
        parts.post(
            BlocksPlaced(request_id, region, span.end_block - len(page_ids), is_exact=arrived.is_exact)
        )
        parts.metrics.loaded(arrived.tier, len(page_ids), time.monotonic() - self._started_s)

    def _pages_of(self, region: LoadRegion, span: Span) -> tuple[PageId, ...]:
        """Those of the last blocks of the span that the request has, and still waits for."""
        return self._parts.state.loads.pages_to_fill(
            self.request.request_id, region, first_block=span.first_block, end_block=span.end_block
        )

    # Claims.

    def _claim(self, first_block: int, end_block: int) -> LoadRegion | None:
        return self._parts.state.loads.open(
            self.request.request_id, first_block=first_block, end_block=end_block, now_s=time.time()
        )

    def _move(self, region: LoadRegion, first_block: int) -> None:
        self._parts.state.loads.move(self.request.request_id, region, first_block)

    def _stop(self, region: LoadRegion, first_block: int) -> None:
        """Blocks of the region before this one do not come."""
        self._parts.state.loads.fail(self.request.request_id, region, first_block, now_s=time.time())

    def _plan_for(self, blocks: Span, link: LinkEstimate) -> StreamPlanner:
        parts = self._parts
        spans = chunk_spans(blocks.first_block, blocks.end_block, chunk_blocks=parts.limits.chunk_blocks)
        return StreamPlanner(
            self.request, spans, costs=parts.costs, link=link, max_level=parts.limits.max_level
        )

    def _next_level(
        self, region: LoadRegion, planner: StreamPlanner, levels: Sequence[LevelCost]
    ) -> LevelCost | None:
        """Asks the plan, claims what it says, and tells how the next chunk is to come; None: not at all."""
        if region not in self.request.loads:
            return None
        plan = planner.plan(levels, self._moment())
        if planner not in self._planners:
            self._planners.append(planner)
            self._parts.metrics.decided(plan.choice)
        self._move(region, planner.first_block(plan))
        if planner.is_over(plan):
            return None
        return next(cost for cost in levels if cost.level == plan.level)

    def _moment(self) -> Moment:
        request, limits = self.request, self._parts.limits
        queue_s = 0.0
        if request.status is Status.WAITING:
            num_ahead = self._parts.state.load().num_waiting_tokens - request.num_tokens
            queue_s = compute_s(
                self._parts.costs, first_block=0, end_block=max(0, num_ahead) // BLOCK_SIZE_TOKENS
            )
        return Moment(
            now_s=time.monotonic(),
            queue_s=queue_s,
            time_left_s=limits.ttft_objective_s - (time.time() - request.arrival_s),
        )
