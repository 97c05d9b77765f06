"""Blocks that were computed here, on their way from device pages into the tiers below and to the stores.

Beside the steps: the pages are pinned, a thread copies them into slots of the memory tier, and they are free again. It
never holds up a step or a request: only a share of the pages may be pinned, and what comes beyond that is not
written (its pages keep it for as long as they can). Where the engine's core is the only one, a copy takes from a step
what it takes, so it goes in small pieces, with pauses for as long as the engine has work: a prompt of 24 MiB that was
pulled and copied at once held a decode step up by 10 to 20 ms (Xeon, AVX-512).

A request that generates fills a block every 16 steps. Such short runs wait a little for what continues them: each write
costs a hop into a thread and a record on disk, and of 32 requests that was a tenth of what their decode steps cost.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvstore.blocks import BlockKey
from kvstore.placement import stretches
from kvstore.store import BlockStore, Reservation
from kvstore.tiers.tier import BlockRun
from workers.computed_blocks import ComputedRun
from workers.cost_model import CopyRate
from workers.engine.kv_memory import KvMemory
from workers.kv_metrics import KvMetrics
from workers.messages import PagesFree
from workers.request import PageId
from workers.state import EngineState
from workers.threads import run_to_end

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteLimits:
    max_pinned_share: float = 0.5  # of all pages, for the milliseconds that copying takes; at least one
    max_lingering_share: float = 0.0625  # of all pages, for up to `linger_s`
    max_batch_blocks: int = 64  # copied at a time
    run_blocks: int = 8  # so many of a chain are written at once, fewer wait for more,
    linger_s: float = 0.5  # but no longer than this, nor when the engine has nothing to do
    max_piece_bytes: int = 2**20  # copied without a pause: a fifth of a millisecond
    max_core_share: float = 0.1  # that copies take while the engine works,
    max_pause_s: float = 0.02  # unless their pauses would become longer than this

    def __post_init__(self) -> None:
        for name in ("max_pinned_share", "max_lingering_share", "max_core_share"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if self.max_batch_blocks < 1:
            raise ValueError(f"max_batch_blocks must be at least 1, got {self.max_batch_blocks}")
        if not 1 <= self.run_blocks <= self.max_batch_blocks:
            raise ValueError(
                f"run_blocks must be within one batch of {self.max_batch_blocks}, got {self.run_blocks}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteParts:
    state: EngineState
    kv_pool: KvMemory
    store: BlockStore
    metrics: KvMetrics
    offer: Callable[[BlockRun], None]  # to the stores
    post: Callable[[PagesFree], None]  # to the loop


class WriteBehind:
    """All methods are called in the event loop's thread, at any time; all but `close` return at once."""

    def __init__(self, parts: WriteParts, *, limits: WriteLimits = WriteLimits()) -> None:
        self._parts = parts
        self._limits = limits
        self._max_pinned = max(1, int(parts.kv_pool.num_pages * limits.max_pinned_share))
        self._max_lingering = int(parts.kv_pool.num_pages * limits.max_lingering_share)
        self._piece_blocks = max(1, limits.max_piece_bytes // parts.kv_pool.layout.block_bytes)
        self._resting = asyncio.Event()
        self._lingering: dict[BlockKey, ComputedRun] = {}  # by the key of the last block
        self._linger: asyncio.TimerHandle | None = None
        self._ready: deque[ComputedRun] = deque()
        self._writing: list[ComputedRun] = []
        self._written = asyncio.Event()
        self._num_pinned = 0
        self._on_their_way: set[BlockKey] = set()
        self._copies = CopyRate()
        self._thread = ThreadPoolExecutor(1, "write-behind")
        self._task: asyncio.Task[None] | None = None

    @property
    def num_pinned(self) -> int:
        """Pages that are being copied, or will be."""
        return self._num_pinned

    def take(self, computed: ComputedRun) -> None:
        """Pages that hold these blocks now; what of them the tiers do not hold yet is written."""
        num_known = len(self._parts.store.lookup(computed.run.keys))
        room = self._max_pinned - self._num_pinned
        end = min(len(computed.run.keys), num_known + room)
        self._parts.metrics.write_behind(num_known, "known")
        self._parts.metrics.write_behind(len(computed.run.keys) - max(end, num_known), "behind")
        # In pieces, so that a long prompt does not need all of its slots at once.
        for start in range(num_known, end, self._limits.max_batch_blocks):
            stop = min(start + self._limits.max_batch_blocks, end)
            page_ids = computed.page_ids[start:stop]
            self._parts.state.pin_pages(page_ids)
            self._num_pinned += len(page_ids)
            self._on_their_way.update(computed.run.keys[start:stop])
            self._collect(ComputedRun(run=computed.run.part(start, stop), page_ids=page_ids))
        if sum(map(_num_blocks, self._lingering.values())) > self._max_lingering:
            self._flush()
        elif self._lingering and self._linger is None:
            self._linger = asyncio.get_running_loop().call_later(self._limits.linger_s, self._flush)
        self._start()

    def save_at_once(self, computed: ComputedRun) -> None:
        """As `take`, where some may be on their way already; until the next step begins nothing pauses or lingers."""
        num_known = len(self._parts.store.lookup(computed.run.keys))
        missing = [key not in self._on_their_way for key in computed.run.keys[num_known:]]
        for start, stop in stretches(missing):
            start, stop = num_known + start, num_known + stop
            self.take(ComputedRun(run=computed.run.part(start, stop), page_ids=computed.page_ids[start:stop]))
        self.rested()

    def is_on_its_way(self, keys: Sequence[BlockKey]) -> bool:
        """Whether any of these blocks waits for its copy, or is being copied."""
        return not self._on_their_way.isdisjoint(keys)

    def copy_s(self, num_blocks: int) -> float:
        """What a copy of so many blocks takes, by those made."""
        return self._copies.seconds(num_blocks * self._parts.kv_pool.layout.block_bytes)

    def step_began(self) -> None:
        """The engine works: copies make pauses from now on."""
        self._resting.clear()

    def rested(self) -> None:
        """The engine has nothing to do: what is on its way goes on without pauses, what waits for more goes too."""
        self._resting.set()
        self._flush()

    def _flush(self) -> None:
        self._stop_lingering()
        self._start()

    async def drop(self, root: BlockKey | None) -> None:
        """Of this root, or at all, nothing is on its way any more: what waits is not written, what is being copied has
        arrived, and can be dropped there."""

        def is_dropped(computed: ComputedRun) -> bool:
            return root is None or computed.run.root == root

        for key, computed in tuple(self._lingering.items()):
            if is_dropped(computed):
                self._let_go(self._lingering.pop(key))
        ready, self._ready = self._ready, deque()
        for computed in ready:
            if is_dropped(computed):
                self._let_go(computed)
            else:
                self._ready.append(computed)
        self._parts.post(PagesFree())
        if any(map(is_dropped, self._writing)):
            await self._written.wait()

    async def close(self) -> None:
        """Drops what waits."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._drop_all()
        self._thread.shutdown()

    def _collect(self, computed: ComputedRun) -> None:
        before = self._lingering.get(computed.run.parent)
        if (
            before is not None
            and _num_blocks(before) + _num_blocks(computed) <= self._limits.max_batch_blocks
        ):
            del self._lingering[computed.run.parent]
            computed = ComputedRun(
                run=before.run.extended(computed.run.keys), page_ids=before.page_ids + computed.page_ids
            )
        if _num_blocks(computed) < self._limits.run_blocks:
            self._lingering[computed.run.keys[-1]] = computed
        else:
            self._ready.append(computed)

    def _stop_lingering(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        self._ready.extend(self._lingering.values())
        self._lingering.clear()

    def _start(self) -> None:
        if self._ready and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._write_all(), name="write-behind")
            self._task.add_done_callback(self._ended)

    async def _write_all(self) -> None:
        while self._ready:
            batch = self._writing = self._next_batch()
            self._written.clear()
            try:
                await self._write(batch)
            finally:
                for computed in batch:
                    self._let_go(computed)
                self._writing = []
                self._written.set()
                self._parts.post(PagesFree())

    def _next_batch(self) -> list[ComputedRun]:
        batch = [self._ready.popleft()]
        num_blocks = _num_blocks(batch[0])
        while self._ready:
            num_blocks += _num_blocks(self._ready[0])
            if num_blocks > self._limits.max_batch_blocks:
                break
            batch.append(self._ready.popleft())
        return batch

    async def _write(self, batch: list[ComputedRun]) -> None:
        page_ids = [page_id for computed in batch for page_id in computed.page_ids]
        room = self._parts.store.reserve(len(page_ids))
        if room is None:
            self._parts.metrics.write_behind(len(page_ids), "no_room")
            return
        with room:
            await self._save(page_ids, room.slots)
            self._commit(batch, room)

    async def _save(self, page_ids: Sequence[PageId], slots: Sequence[int]) -> None:
        kv_pool, arena_SX = self._parts.kv_pool, self._parts.store.arena_SX
        for start in range(0, len(page_ids), self._piece_blocks):
            stop = start + self._piece_blocks
            began_s = time.monotonic()
            save = functools.partial(kv_pool.save, page_ids[start:stop], arena_SX, slots[start:stop])
            await run_to_end(self._thread, save)
            copy_s = time.monotonic() - began_s
            num_bytes = len(page_ids[start:stop]) * kv_pool.layout.block_bytes
            self._copies.observe(num_bytes, copy_s=copy_s)
            if stop < len(page_ids) or self._ready:
                await self._pause(copy_s)

    async def _pause(self, copy_s: float) -> None:
        """After a copy that took so long; none while the engine rests."""
        limits = self._limits
        pause_s = min(limits.max_pause_s, copy_s * (1.0 / limits.max_core_share - 1.0))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._resting.wait()

    def _commit(self, batch: list[ComputedRun], room: Reservation) -> None:
        start = 0
        for computed in batch:
            stop = start + _num_blocks(computed)
            room.commit(computed.run, slots=room.slots[start:stop])
            self._parts.metrics.write_behind(stop - start, "written")
            self._parts.offer(computed.run)
            start = stop

    def _let_go(self, computed: ComputedRun) -> None:
        self._num_pinned -= len(computed.page_ids)
        self._on_their_way.difference_update(computed.run.keys)
        self._parts.state.unpin_pages(computed.page_ids)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("write_behind_failed", exc_info=error)
            self._drop_all()
            self._parts.post(PagesFree())

    def _drop_all(self) -> None:
        self._stop_lingering()
        while self._ready:
            self._let_go(self._ready.popleft())


def _num_blocks(computed: ComputedRun) -> int:
    return len(computed.page_ids)
