"""All tiers of a worker below its device pages, as one: memory in front, perhaps a disk behind it.

It lives in the thread of the event loop; bytes move in threads. Nothing here raises because of a disk: one that fails,
fills, hangs or vanishes is counted, and memory goes on alone.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvstore.blocks import BlockKey
from kvstore.disk_backlog import DiskBacklog
from kvstore.disk_io import Disk
from kvstore.disk_reader import DiskReader, Read
from kvstore.holdings import Holdings
from kvstore.placement import stretches
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.tier import BlockRun, HeldPrefix, Tier, TierStats

# Past it the disk counts as hung, and is not asked again until it answers.
DISK_TIMEOUT_S = 5.0
# While a drop goes through the disk's index: about 3,000 blocks, which are noted in a millisecond.
NOTE_EVERY_S = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreDescription:
    tiers: Mapping[Tier, TierStats]
    prefixes: tuple[tuple[Tier, HeldPrefix], ...]
    num_lookup_blocks: int
    num_waiting_writes: int  # blocks
    num_missed_writes: int  # blocks that never reached the disk


class _Closing(ABC):
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None: ...


class PinnedBlocks(_Closing):
    """Leading blocks of a chain that stay in these slots until `close`; `tiers` says where each was found."""

    def __init__(self, memory: MemoryTier, *, slots: Sequence[int], tiers: Sequence[Tier]) -> None:
        self.slots = tuple(slots)
        self.tiers = tuple(tiers)
        self._memory: MemoryTier | None = memory

    def close(self) -> None:
        """Idempotent."""
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.unpin(self.slots)


class Reservation(_Closing):
    """Slots to be filled. Whoever still reads a slot commits it afterwards: it may be given away from then on."""

    def __init__(self, memory: MemoryTier, *, slots: Sequence[int], backlog: DiskBacklog | None) -> None:
        self.slots = tuple(slots)
        self._memory = memory
        self._open = set(slots)
        self._backlog = backlog

    def commit(self, run: BlockRun, *, slots: Sequence[int]) -> None:
        """These slots hold these blocks, exactly: they are held from now on and written to disk behind.

        Where a block is held already, the second copy is let go.
        """
        if len(slots) != len(run.keys) or not self._open.issuperset(slots):
            raise ValueError(f"{len(run.keys)} blocks do not fit slots {list(slots)} of {sorted(self._open)}")
        self._open.difference_update(slots)
        is_new = self._memory.commit(run, slots)
        if self._backlog is not None:
            for start, stop in stretches(is_new):
                self._backlog.offer(run.part(start, stop))

    def close(self) -> None:
        """Frees what was not committed. Idempotent."""
        self._memory.free(self._open)
        self._open = set()


class BlockStore:
    def __init__(
        self, memory: MemoryTier, *, disk: Disk | None, disk_timeout_s: float = DISK_TIMEOUT_S
    ) -> None:
        self._memory = memory
        self._disk = disk
        self._disk_timeout_s = disk_timeout_s
        self._reader = self._backlog = None
        if disk is not None:
            self._reader = DiskReader(disk, memory, on_change=self._note_disk, timeout_s=disk_timeout_s)
            self._backlog = DiskBacklog(disk, memory, on_change=self._note_disk)
        self._num_lookup_blocks = 0
        self._note_disk()

    @property
    def arena_SX(self) -> NDArray[np.uint8]:
        return self._memory.arena_SX

    @property
    def holdings(self) -> Holdings:
        return self._memory.holdings

    def lookup(self, keys: Sequence[BlockKey]) -> tuple[Tier, ...]:
        """Where each block of the longest run from the first key on is held. Counts as no use."""
        self._num_lookup_blocks += len(keys)
        num_in_memory = self._memory.longest_prefix(keys)
        tiers = [Tier.MEMORY] * num_in_memory
        disk = None if self._reader is None or self._reader.is_hung else self._disk
        if disk is None:
            return tuple(tiers)
        for key in keys[num_in_memory:]:
            if key in self._memory:
                tiers.append(Tier.MEMORY)
            elif key in disk:
                tiers.append(Tier.DISK)
            else:
                break
        return tuple(tiers)

    async def pin(self, keys: Sequence[BlockKey]) -> PinnedBlocks:
        """The leading blocks that are held, all in memory now; fewer than `lookup` found where the disk failed."""
        tiers = self.lookup(keys)
        keys = keys[: len(tiers)]
        if Tier.DISK in tiers:
            slots = await self._pin_promoted(keys, tiers)
        else:
            slots = self._memory.pin(keys)
        self._memory.hit(keys[: len(slots)])
        if self._backlog is not None and slots:
            # What is used again belongs on disk, even if the disk was behind, or failed, when it was stored.
            self._backlog.offer(self._memory.run(keys[: len(slots)]))
        return PinnedBlocks(self._memory, slots=slots, tiers=tiers[: len(slots)])

    def reserve(self, num_blocks: int) -> Reservation | None:
        """None if so many cannot be had: the rest is pinned."""
        if num_blocks > self._memory.num_idle:
            return None
        slots = self._memory.reserve(num_blocks)
        if len(slots) < num_blocks:  # idle blocks that pinned ones continue stay
            self._memory.free(slots)
            return None
        return Reservation(self._memory, slots=slots, backlog=self._backlog)

    async def drop(self, root: BlockKey | None) -> int:
        """Forgets all blocks of a root, or just all, that any tier holds now, and says how many they were.

        It happens in parts, between which all else goes on; a disk that is not done in time goes on without us, and
        serves nothing of the root until it is. Cancelled, it may leave some in memory.
        """
        if self._disk is None or self._reader is None or self._backlog is None:
            return len([key async for key in self._drop_from_memory(root)])
        self._reader.refuse(root)
        self._backlog.forget(root)
        num_blocks = 0
        try:
            async for key in self._drop_from_memory(root):
                num_blocks += key not in self._disk and not self._backlog.is_queued(key)
        finally:
            # Not earlier: until now what is in memory could go on its way to the disk.
            erasing = self._backlog.erase(root, on_done=partial(self._reader.allow, root))
        return num_blocks + await self._erased(erasing)

    def most_valuable(self, *, max_blocks: int) -> list[BlockRun]:
        """What memory alone holds and drops last, whole chains first to last; what is on disk is safe there."""
        found: list[BlockRun] = []
        for chain in self._memory.chains_by_value():
            is_lost = [self._disk is None or key not in self._disk for key in chain.keys]
            for start, stop in stretches(is_lost):
                stop = min(stop, start + max_blocks)
                found.append(chain.part(start, stop))
                max_blocks -= stop - start
                if max_blocks == 0:
                    return found
        return found

    def check(self) -> None:
        self._memory.check()
        self.holdings.check()

    def describe(self, *, max_prefixes: int = 0) -> StoreDescription:
        tiers = {Tier.MEMORY: self._memory.stats()}
        prefixes = [(Tier.MEMORY, prefix) for prefix in self._memory.prefixes(max_prefixes)]
        if self._disk is not None and self._reader is not None:
            stats = self._disk.stats()
            tiers[Tier.DISK] = replace(stats, num_errors=stats.num_errors + self._reader.num_errors)
            prefixes += [(Tier.DISK, prefix) for prefix in self._disk.prefixes(max_prefixes)]
        prefixes.sort(key=lambda found: found[1].age_s, reverse=True)
        return StoreDescription(
            tiers=tiers,
            prefixes=tuple(prefixes[:max_prefixes]),
            num_lookup_blocks=self._num_lookup_blocks,
            num_waiting_writes=0 if self._backlog is None else self._backlog.num_waiting_blocks,
            num_missed_writes=0 if self._backlog is None else self._backlog.num_missed_blocks,
        )

    async def close(self, *, timeout_s: float = DISK_TIMEOUT_S) -> None:
        """Writes what waits for the disk, within `timeout_s`."""
        if self._disk is None or self._reader is None or self._backlog is None:
            return
        await asyncio.gather(
            self._reader.close(timeout_s=timeout_s), self._backlog.close(timeout_s=timeout_s)
        )
        self._disk.close()

    async def _pin_promoted(self, keys: Sequence[BlockKey], tiers: Sequence[Tier]) -> list[int]:
        assert self._reader is not None
        pinned: list[int] = []
        reads: list[Read] = []
        try:
            for start, stop in stretches([tier is Tier.MEMORY for tier in tiers]):
                pinned += self._memory.pin(keys[start:stop])
            for start, stop in stretches([tier is Tier.DISK for tier in tiers]):
                reads += self._reader.start(keys[start:stop])
            await self._reader.wait(reads)
            return self._memory.pin(keys)
        finally:
            self._reader.leave(reads)
            self._memory.unpin(pinned)

    async def _drop_from_memory(self, root: BlockKey | None) -> AsyncIterator[BlockKey]:
        for dropped in self._memory.drop_in_parts(root):
            for key in dropped:
                yield key
            await asyncio.sleep(0)

    async def _erased(self, erasing: "asyncio.Future[int]") -> int:
        """How many blocks; 0 if the disk is not done in time, or fails."""
        deadline_s = time.monotonic() + self._disk_timeout_s
        while not erasing.done() and time.monotonic() < deadline_s:
            await asyncio.wait({erasing}, timeout=NOTE_EVERY_S)
            self._note_disk()
        return erasing.result() if erasing.done() and erasing.exception() is None else 0

    def _note_disk(self) -> None:
        if self._disk is not None:
            stored, removed = self._disk.take_changes()
            self.holdings.note(Tier.DISK, stored=stored, removed=removed)
