"""Loads of all requests: looked up when a request waits, begun as turns allow, given up when computing overtakes them.

The loop tells what happens to a request (`begin`, `admitted`, `end`) and calls `watch` whenever requests may have
moved; what loads have to say goes to its inbox.
"""

import asyncio
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from kvstore.blocks import BLOCK_SIZE_TOKENS
from kvstore.tiers.tier import Tier
from workers.load_parts import LoadParts, Sources
from workers.load_plan import level_estimates
from workers.logs import log_event
from workers.messages import PagesFree
from workers.request import Request, RequestId
from workers.request_load import Found, RequestLoad

NUM_THREADS = 2  # copies and decoding; more would only take cores from the engine

_logger = logging.getLogger(__name__)


class _Active:
    """A load that has begun, and how long the engine has been waiting for it."""

    def __init__(self, load: RequestLoad, task: "asyncio.Task[None]") -> None:
        self.load = load
        self.task = task
        self.waits_for: tuple[int, int] | None = None  # the first region, and how far it is
        self.timer: asyncio.TimerHandle | None = None
        self.is_given_up = False

    def stop_waiting(self) -> None:
        self.waits_for = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Loader:
    """All methods are called in the event loop's thread, at any time; all but `close` return at once."""

    def __init__(self, parts: LoadParts) -> None:
        self._parts = parts
        self._sources = Sources(levels=level_estimates(parts.codec.levels, parts.codec.layout))
        self._threads = ThreadPoolExecutor(NUM_THREADS, "load")
        self._active: dict[RequestId, _Active] = {}
        self._queued: dict[RequestId, Request] = {}  # until it is their turn
        self._tasks: set[asyncio.Task[None]] = set()  # those that have lost their request included

    @property
    def num_tasks(self) -> int:
        """Loads that have not ended: they may hold slots, pins and connections."""
        return len(self._tasks)

    def begin(self, request: Request) -> None:
        """The request waits, for the first time or again."""
        if request.kv_source is not None:
            return
        if len(self._tasks) < self._parts.limits.max_num_loads:
            self._start(request)
        else:
            self._queued[request.request_id] = request

    def admitted(self, request_id: RequestId) -> None:
        """The request has pages. One whose turn has not come is computed."""
        self._queued.pop(request_id, None)
        if (active := self._active.get(request_id)) is not None:
            active.load.admit()

    def end(self, request_id: RequestId) -> None:
        """The request has gone, or lost its pages: nothing is brought for it any more."""
        self._queued.pop(request_id, None)
        if (active := self._active.pop(request_id, None)) is not None:
            active.stop_waiting()
            active.task.cancel()

    def watch(self) -> None:
        """Gives up what is late, and what nobody waits for any more."""
        if not self._active:
            return  # it is called before every step
        stalled = {request.request_id for request in self._parts.state.loads.stalled()}
        for request_id, active in list(self._active.items()):
            load = active.load
            if not load.request.loads:
                if (seconds := load.regret_s()) is not None:
                    self._parts.metrics.regret(seconds)
                self.end(request_id)
            elif request_id in stalled:
                self._wait(active)
            else:
                active.stop_waiting()

    async def close(self) -> None:
        """Ends all loads."""
        self._queued.clear()
        for request_id in list(self._active):
            self.end(request_id)
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        self._threads.shutdown()

    def _start(self, request: Request) -> None:
        found = self._look_up(request)
        if not found.is_worth_it:
            return
        load = RequestLoad(request, found, parts=self._parts, sources=self._sources)
        if not request.loads:
            return
        task = asyncio.create_task(load.run(self._threads), name=f"load {request.request_id}")
        active = self._active[request.request_id] = _Active(load, task)
        self._tasks.add(task)
        # A callback and not the task itself: a task may be cancelled before its first line.
        task.add_done_callback(lambda done: self._ended(active, done))

    def _look_up(self, request: Request) -> Found:
        """From the first block on where the tiers have as many: pages may be evicted while the request waits."""
        store, limit = self._parts.store, (request.num_tokens - 1) // BLOCK_SIZE_TOKENS
        keys = tuple(request.block_keys[:limit])
        num_cached = self._parts.state.num_cached_blocks(keys)
        first_block, tiers = 0, store.lookup(keys)
        if len(tiers) < num_cached:
            first_block, tiers = num_cached, store.lookup(keys[num_cached:])
        num_in_memory = next((i for i, tier in enumerate(tiers) if tier is not Tier.MEMORY), len(tiers))
        local_end = first_block + len(tiers)
        holders = tuple(holder for holder in request.kv_holders if holder.num_blocks > local_end)
        found = Found(
            root=request.root,
            keys=keys,
            first_block=first_block,
            memory_end=first_block + num_in_memory,
            local_end=local_end,
            holders=holders,
        )
        hits = Counter({Tier.DEVICE: num_cached, Tier.PEER: max(0, found.end_block - local_end)})
        hits.update(tier for position, tier in enumerate(tiers, first_block) if position >= num_cached)
        self._parts.metrics.lookup(len(keys), hits)
        return found

    def _wait(self, active: _Active) -> None:
        """The engine has nothing to compute of the request: a chunk that takes longer than computing it is too late."""
        region = active.load.request.loads[0]
        waits_for = region.end_block, region.placed_block
        if waits_for != active.waits_for:
            active.stop_waiting()
            active.waits_for = waits_for
            loop = asyncio.get_running_loop()
            active.timer = loop.call_later(active.load.patience_s(), self._give_up, active, "late")

    def _give_up(self, active: _Active, reason: str) -> None:
        """The engine computes the rest as soon as the load has ended: until then a thread may write to the pages."""
        if active.is_given_up:
            return
        active.is_given_up = True
        self._parts.metrics.load_failed(reason)
        active.stop_waiting()
        active.task.cancel()

    def _ended(self, active: _Active, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            request_id = active.load.request.request_id
            if isinstance(error, TimeoutError):
                log_event(_logger, "load_timed_out", level=logging.WARNING, request=request_id)
            else:
                _logger.error("load_failed", exc_info=error)
            self._give_up(active, type(error).__name__)
        if active.is_given_up:
            active.load.give_up()
        self._parts.post(PagesFree())
        while self._queued and len(self._tasks) < self._parts.limits.max_num_loads:
            self._start(self._queued.pop(next(iter(self._queued))))
