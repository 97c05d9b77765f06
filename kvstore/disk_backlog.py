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
        self._waiting: OrderedDict[BlockKey, BlockRun] = (
            OrderedDict()
        )  # by the key of the last block, once each
        self._writing: BlockRun | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_waiting_blocks = 0
        self.num_missed_blocks = 0

    def offer(self, run: BlockRun) -> None:
        """Blocks of which memory holds the bytes. Those that are on disk already are not written again."""
        for start, stop in stretches([key not in self._disk for key in run.keys]):
            for first in range(start, stop, self._max_blocks):
                self._enqueue(run.part(first, min(stop, first + self._max_blocks)))
        self._write_next()

    def forget(self, root: BlockKey | None) -> None:
        """Nothing of this root, or just nothing, waits any more."""
        for last_key, run in tuple(self._waiting.items()):
            if root is None or run.root == root:
                self._take_out(last_key)

    def is_writing(self, key: BlockKey) -> bool:
        return self._writing is not None and key in self._writing.keys

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
            self.num_waiting_blocks = 0
            self._waiting.clear()
        await self._thread.close(timeout_s=max(0.0, deadline_s - loop.time()))

    def _enqueue(self, run: BlockRun) -> None:
        known = self._waiting.get(run.keys[-1])
        if known is not None and len(known.keys) >= len(run.keys):
            return  # memory gave them away and has them again, or they were offered twice
        if self.num_waiting_blocks + len(run.keys) > MAX_WAITING_BLOCKS:
            self._miss(len(run.keys))
            return
        before = self._waiting.get(run.parent)
        if before is not None and self._fit_one_write(before, run):
            self._take_out(run.parent)
            run = before.extended(run.keys)
        if run.keys[-1] in self._waiting:
            self._take_out(run.keys[-1])
        self._waiting[run.keys[-1]] = run
        self.num_waiting_blocks += len(run.keys)

    def _take_out(self, last_key: BlockKey) -> BlockRun:
        run = self._waiting.pop(last_key)
        self.num_waiting_blocks -= len(run.keys)
        return run

    def _fit_one_write(self, before: BlockRun, run: BlockRun) -> bool:
        return (
            before.root == run.root
            and before.first_position + len(before.keys) == run.first_position
            and len(before.keys) + len(run.keys) <= self._max_blocks
        )

    def _write_next(self) -> None:
        while self._writing is None and self._waiting:
            run = self._take_out(next(iter(self._waiting)))
            slots = self._memory.pin(run.keys)
            self._miss(len(run.keys) - len(slots))
            if slots:
                self._write(run.part(0, len(slots)), slots)
        if self._writing is None:
            self._idle.set()

    def _write(self, run: BlockRun, slots: list[int]) -> None:
        blocks = [self._memory.arena_SX[slot] for slot in slots]
        writing = self._thread.submit(partial(self._disk.write, run, blocks))
        if writing is None:
            self._memory.unpin(slots)
            self._miss(len(slots))
            return
        self._writing = run
        self._idle.clear()
        writing.add_done_callback(partial(self._finish, slots))

    def _finish(self, slots: list[int], writing: "asyncio.Future[None]") -> None:
        self._memory.unpin(slots)
        if self._note_failure(writing):
            self._miss(len(slots))
        self._writing = None
        self._on_change()
        self._write_next()

    def _erase(self, root: BlockKey | None) -> int:
        num_dropped = self._disk.drop(root)
        try:
            self._disk.erase_dropped()
        except DiskFailed as error:
            _logger.warning("what was dropped is erased from the disk tier with the next write: %s", error)
        return num_dropped

    def _note_erased(self, on_done: Callable[[], None], erasing: "asyncio.Future[int]") -> None:
        self._note_failure(erasing)
        self._on_change()
        on_done()

    def _note_failure(self, done: "asyncio.Future[_Result]") -> bool:
        error = done.exception()
        if error is None:
            return False
        _logger.warning("writing to the disk tier failed: %s", error)
        return True

    def _miss(self, num_blocks: int) -> None:
        self.num_missed_blocks += num_blocks
