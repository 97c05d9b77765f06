"""Writes what memory holds to disk, behind: nobody waits for it, and it may fall behind.

Runs that continue each other become one write. Waiting ones hold nothing: what memory gave away before its turn came
is not written. Only what is being written is pinned.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from kvstore.blocks import BlockKey
from kvstore.disk_io import Disk, IoThread
from kvstore.errors import DiskFailed
from kvstore.failed_writes import FailedWrites
from kvstore.placement import stretches
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.tier import BlockRun

MAX_WAITING_BLOCKS = 4096
MAX_BLOCKS_PER_WRITE = 128
MAX_JOBS = 64  # one write, and drops
_logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class DiskBacklog:
    def __init__(self, disk: Disk, memory: MemoryTier, *, on_change: Callable[[], None]) -> None:
        self._disk = disk
        self._memory = memory
        self._on_change = on_change
        self._thread = IoThread("kv-disk-writes", max_jobs=MAX_JOBS)
        # A hung write must not keep most of the memory pinned.
        self._max_blocks = max(1, min(MAX_BLOCKS_PER_WRITE, memory.num_slots // 4))
        self._waiting: OrderedDict[BlockKey, BlockRun] = OrderedDict()  # by the key of the last block
        self._queued: set[BlockKey] = set()  # waiting or being written
        self._is_writing = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._failed = FailedWrites()
        self.num_waiting_blocks = 0
        self.num_missed_blocks = 0

    def offer(self, run: BlockRun) -> None:
        """Blocks of which memory holds the bytes. Those that are on disk or on their way are not written again."""
        is_news = [key not in self._queued and key not in self._disk for key in run.keys]
        for start, stop in stretches(is_news):
            for first in range(start, stop, self._max_blocks):
                self._enqueue(run.part(first, min(stop, first + self._max_blocks)))
        self._write_next()

    def forget(self, root: BlockKey | None) -> None:
        """Nothing of this root, or just nothing, waits any more."""
        for last_key, run in tuple(self._waiting.items()):
            if root is None or run.root == root:
                del self._waiting[last_key]
                self.num_waiting_blocks -= len(run.keys)
                self._queued.difference_update(run.keys)

    def is_queued(self, key: BlockKey) -> bool:
        """It waits, or is being written."""
        return key in self._queued

    def erase(self, root: BlockKey | None, *, on_done: Callable[[], None]) -> "asyncio.Future[int]":
        """Drops a root from the disk, or just all, once what is being written is there: how many blocks that were.

        `on_done` is called whatever comes of it, even if nobody waits any more.
        """
        erasing = self._thread.submit(partial(self._erase, root))
        if erasing is None:
            _logger.warning("too many drops wait for the disk tier: one is not erased until the next write")
            erasing = asyncio.get_running_loop().create_future()
            erasing.set_result(self._disk.drop(root))
        erasing.add_done_callback(partial(self._note_erased, on_done))
        return erasing

    async def close(self, *, timeout_s: float) -> None:
        """Writes what waits, within `timeout_s`."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._idle.wait()
        except TimeoutError:
            self._miss(self.num_waiting_blocks)
            self.forget(None)
        await self._thread.close(timeout_s=max(0.0, deadline_s - loop.time()))

    def _enqueue(self, run: BlockRun) -> None:
        if self.num_waiting_blocks + len(run.keys) > MAX_WAITING_BLOCKS:
            self._miss(len(run.keys))
            return
        self._queued.update(run.keys)
        self.num_waiting_blocks += len(run.keys)
        before = self._waiting.get(run.parent)
        if before is not None and self._fit_one_write(before, run):
            del self._waiting[run.parent]
            run = before.extended(run.keys)
        self._waiting[run.keys[-1]] = run

    def _fit_one_write(self, before: BlockRun, run: BlockRun) -> bool:
        return (
            before.root == run.root
            and before.first_position + len(before.keys) == run.first_position
            and len(before.keys) + len(run.keys) <= self._max_blocks
        )

    def _write_next(self) -> None:
        while not self._is_writing and self._waiting:
            _, run = self._waiting.popitem(last=False)
            self.num_waiting_blocks -= len(run.keys)
            slots = self._memory.pin(run.keys)
            missed = run.keys[len(slots) :]
            self._miss(len(missed))
            self._queued.difference_update(missed)
            if slots:
                self._write(run.part(0, len(slots)), slots)
        if not self._is_writing:
            self._idle.set()

    def _write(self, run: BlockRun, slots: list[int]) -> None:
        blocks = [self._memory.arena_SX[slot] for slot in slots]
        writing = self._thread.submit(partial(self._disk.write, run, blocks))
        if writing is None:
            self._let_go(run, slots)
            self._miss(len(slots))
            return
        self._is_writing = True
        self._idle.clear()
        writing.add_done_callback(partial(self._finish, run, slots))

    def _finish(self, run: BlockRun, slots: list[int], writing: "asyncio.Future[None]") -> None:
        self._let_go(run, slots)
        self._note_written(writing.exception(), num_blocks=len(slots))
        self._is_writing = False
        self._on_change()
        self._write_next()

    def _let_go(self, run: BlockRun, slots: list[int]) -> None:
        self._memory.unpin(slots)
        self._queued.difference_update(run.keys)

    def _erase(self, root: BlockKey | None) -> int:
        num_dropped = self._disk.drop(root)
        try:
            self._disk.erase_dropped()
        except DiskFailed as error:
            _logger.warning("what was dropped is erased from the disk tier with the next write: %s", error)
        return num_dropped

    def _note_erased(self, on_done: Callable[[], None], erasing: "asyncio.Future[int]") -> None:
        if error := erasing.exception():
            _logger.warning("erasing from the disk tier failed: %s", error)
        self._on_change()
        on_done()

    def _note_written(self, error: BaseException | None, *, num_blocks: int) -> None:
        now_s = asyncio.get_running_loop().time()
        if error is None:
            self._failed.succeeded(now_s=now_s)
        else:
            self._failed.failed(error, num_blocks=num_blocks, now_s=now_s)
            self._miss(num_blocks)

    def _miss(self, num_blocks: int) -> None:
        self.num_missed_blocks += num_blocks
