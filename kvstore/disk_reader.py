"""Brings blocks from disk into memory, in a thread of its own, for whoever waits for them.

A read belongs to nobody: those who want the same blocks share it, and it runs to its end even if all of them gave up,
as a thread inside a system call cannot be stopped. Its slots are reserved until then.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from kvstore.blocks import BlockKey
from kvstore.disk_io import Disk, IoThread
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.tier import BlockRun

MAX_READS = 32
_logger = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True, slots=True)
class Read:
    run: BlockRun
    keys: frozenset[BlockKey]
    slots: list[int]
    done: "asyncio.Future[None]"
    num_waiting: int = 0
    pinned: list[int] = field(default_factory=list)  # for those who wait and were not woken yet
    is_dropped: bool = False


class DiskReader:
    def __init__(
        self,
        disk: Disk,
        memory: MemoryTier,
        *,
        on_change: Callable[[], None],
        timeout_s: float,
    ) -> None:
        self._disk = disk
        self._memory = memory
        self._on_change = on_change
        self._timeout_s = timeout_s
        self._thread = IoThread("kv-disk-reads", max_jobs=MAX_READS)
        self._reads: dict[BlockKey, Read] = {}
        self._refused: list[BlockKey | None] = []
        self.is_hung = False
        self.num_errors = 0

    def start(self, keys: Sequence[BlockKey]) -> list[Read]:
        """The reads, new or under way, that bring these consecutive blocks; wait for them, then leave them."""
        reads: list[Read] = []
        start = 0
        while start < len(keys):
            read = self._reads.get(keys[start])
            if read is None:
                read = self._begin(keys[start : self._stretch_end(keys, start)])
                if read is None:
                    break
            while start < len(keys) and keys[start] in read.keys:
                start += 1
            read.num_waiting += 1
            reads.append(read)
        return reads

    async def wait(self, reads: Iterable[Read]) -> None:
        """Until they are done, or the disk hangs."""
        under_way = {read.done for read in reads if not read.done.done()}
        if under_way:
            _, late = await asyncio.wait(under_way, timeout=self._timeout_s)
            if late and not self.is_hung:
                self.is_hung = True
                self.num_errors += 1
                _logger.warning("the disk tier has not answered for %g s: on without it", self._timeout_s)

    def leave(self, reads: Iterable[Read]) -> None:
        for read in reads:
            read.num_waiting -= 1
            if read.num_waiting == 0:
                self._memory.unpin(read.pinned)
                read.pinned = []

    def refuse(self, root: BlockKey | None) -> None:
        """Until it is allowed again nothing of this root, or just nothing, comes from disk: no read begins, and what
        is being read is not kept."""
        self._refused.append(root)
        for read in self._reads.values():
            read.is_dropped |= self._is_refused(read.run.root)

    def allow(self, root: BlockKey | None) -> None:
        """Takes one `refuse` back."""
        self._refused.remove(root)

    async def close(self, *, timeout_s: float) -> None:
        await self._thread.close(timeout_s=timeout_s)

    def _stretch_end(self, keys: Sequence[BlockKey], start: int) -> int:
        end = start + 1
        while end < len(keys) and keys[end] not in self._reads:
            end += 1
        return end

    def _begin(self, keys: Sequence[BlockKey]) -> Read | None:
        run = None if self.is_hung else self._disk.run(keys)
        if run is None or self._is_refused(run.root):
            return None
        slots = self._memory.reserve(len(run.keys))
        if not slots:
            return None
        run = run.part(0, len(slots))
        blocks = [self._memory.arena_SX[slot] for slot in slots]
        reading = self._thread.submit(partial(self._disk.read, run.keys, blocks))
        if reading is None:
            self._memory.free(slots)
            return None
        done = asyncio.get_running_loop().create_future()
        read = Read(run=run, keys=frozenset(run.keys), slots=slots, done=done)
        self._reads.update(dict.fromkeys(run.keys, read))
        reading.add_done_callback(partial(self._finish, read))
        return read

    def _is_refused(self, root: BlockKey) -> bool:
        return None in self._refused or root in self._refused

    def _finish(self, read: Read, reading: "asyncio.Future[int]") -> None:
        self.is_hung = False
        for key in read.run.keys:
            del self._reads[key]
        num_read = self._num_read(reading)
        if read.is_dropped:
            num_read = 0
        self._memory.free(read.slots[num_read:])
        if num_read:
            self._memory.commit(read.run.part(0, num_read), read.slots[:num_read])
            if read.num_waiting:
                read.pinned = self._memory.pin(read.run.keys[:num_read])
        self._on_change()
        read.done.set_result(None)

    def _num_read(self, reading: "asyncio.Future[int]") -> int:
        error = reading.exception()
        if error is None:
            return reading.result()
        self.num_errors += 1
        _logger.warning("reading from the disk tier failed: %s", error)
        return 0
