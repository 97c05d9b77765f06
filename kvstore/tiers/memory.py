"""The memory tier: one arena of equal slots, and the book of what is in them."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.blocks import BlockKey
from kvstore.holdings import Holdings
from kvstore.residency import Residency
from kvstore.tiers.tier import BlockRun, HeldPrefix, Tier, TierStats


class MemoryTier:
    """`buffer` is the caller's, who may have page-locked it; what does not fill a slot at its end stays unused.

    All of it is used by one thread; the bytes of reserved and pinned slots, by any.
    """

    def __init__(
        self,
        buffer: NDArray[np.uint8],
        *,
        block_bytes: int,
        policy: str,
        holdings: Holdings,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        num_slots = buffer.size // block_bytes
        if num_slots < 1:
            raise ValueError(f"{buffer.size} bytes hold no block of {block_bytes} bytes")
        self.arena_SX = buffer.reshape(-1)[: num_slots * block_bytes].reshape(num_slots, block_bytes)
        self.holdings = holdings
        self._residency = Residency(num_slots, policy=policy)
        self._now_s = now_s
        self._num_hits = self._num_stored = self._num_evicted = 0

    @property
    def num_slots(self) -> int:
        return self._residency.num_slots

    @property
    def num_idle(self) -> int:
        """Slots that are neither reserved nor pinned."""
        return self._residency.num_idle

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._residency

    def longest_prefix(self, keys: Sequence[BlockKey]) -> int:
        return len(self._residency.longest_prefix(keys, len(keys)))

    def run(self, keys: Sequence[BlockKey]) -> BlockRun:
        """Where these consecutive blocks are in their chain; the first one is held."""
        return self._residency.run(keys)

    def pin(self, keys: Sequence[BlockKey]) -> list[int]:
        """The slots of the leading blocks that are held, which stay until they are unpinned."""
        return self._residency.pin(keys)

    def unpin(self, slots: Iterable[int]) -> None:
        self._residency.unpin(slots)

    def hit(self, keys: Sequence[BlockKey]) -> None:
        """These blocks are of use now."""
        self._num_hits += len(keys)
        self._residency.touch(keys, now_s=self._now_s())

    def reserve(self, num_slots: int) -> list[int]:
        """Fewer if the rest is in use."""
        slots, dropped = self._residency.reserve(num_slots, now_s=self._now_s())
        self._num_evicted += len(dropped)
        self.holdings.note(Tier.MEMORY, removed=dropped)
        return slots

    def commit(self, run: BlockRun, slots: Sequence[int]) -> list[bool]:
        """The reserved slots hold these blocks; False where another slot did already: this one is free then."""
        is_new = self._residency.commit(slots, run=run, now_s=self._now_s())
        stored = [key for key, is_stored in zip(run.keys, is_new, strict=True) if is_stored]
        self._num_stored += len(stored)
        self.holdings.note(Tier.MEMORY, stored=stored)
        return is_new

    def free(self, slots: Iterable[int]) -> None:
        self._residency.free(slots)

    def drop_in_parts(self, root: BlockKey | None) -> Iterator[list[BlockKey]]:
        """As `Residency.drop_in_parts`."""
        for dropped in self._residency.drop_in_parts(root):
            self.holdings.note(Tier.MEMORY, removed=dropped)
            yield dropped

    def chains_by_value(self) -> Iterator[BlockRun]:
        """As `Residency.chains_by_value`."""
        return self._residency.chains_by_value(now_s=self._now_s())

    def stats(self) -> TierStats:
        block_bytes = self.arena_SX.shape[1]
        return TierStats(
            num_blocks=len(self._residency),
            capacity_blocks=self.num_slots,
            used_bytes=len(self._residency) * block_bytes,
            capacity_bytes=self.arena_SX.size,
            num_hit_blocks=self._num_hits,
            num_stored_blocks=self._num_stored,
            num_evicted_blocks=self._num_evicted,
            num_errors=0,
        )

    def prefixes(self, max_prefixes: int) -> list[HeldPrefix]:
        return self._residency.prefixes(max_prefixes, now_s=self._now_s())

    def check(self) -> None:
        self._residency.check()
