"""In which order blocks leave: one queue for each class of recompute cost, compared by their heads."""

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from heapq import heappop, heappush

from kvstore.placement import Policy, cost_class, retention_value

_LAST_POSITION = 2**32 - 1
_SLOT_BITS = 32
_TIME_SHIFT = 64
# As many as the longest chains of today have blocks: 131,072 tokens. What is behind them is found anew, 0.6 us each.
_NUM_KNOWN_CLASSES = 8192


class EvictionOrder:
    """A queue is a heap of (last used, minus position, slot) in which an entry may be older than its slot's last use,
    never younger; it is put right when it comes to the head. Using a block therefore costs one store.

    An entry is one integer, 48 bytes; a tuple would be 136, and one more object for the garbage collector. Times are
    not negative, and such floats have the order of their bits.
    """

    def __init__(self, num_slots: int, *, policy: Policy, block_size_tokens: int) -> None:
        # Found when it is wanted, as most blocks are continued by others and not queued for long; then kept, as a drop
        # or a wave of evictions queues every block.
        self._class_at = lru_cache(_NUM_KNOWN_CLASSES)(
            lambda position: cost_class(policy(position * block_size_tokens))
        )
        self._queues: dict[int, list[int]] = {}
        self._last_used_s = array("d", [0.0]) * num_slots
        self._last_used_bits = memoryview(self._last_used_s).cast("B").cast("q")
        self._positions = array("I", [0]) * num_slots
        self._is_queued = bytearray(num_slots)

    def last_used_s(self, slot: int) -> float:
        return self._last_used_s[slot]

    def use(self, slot: int, *, at_s: float) -> None:
        self._last_used_s[slot] = at_s

    def place(self, slots: Sequence[int], *, first_position: int, at_s: float) -> None:
        """The slots hold other blocks now, which follow each other."""
        last_used_s, positions = self._last_used_s, self._positions
        for position, slot in enumerate(slots, first_position):
            last_used_s[slot] = at_s
            positions[slot] = position

    def position(self, slot: int) -> int:
        return self._positions[slot]

    def value(self, slot: int, *, now_s: float) -> tuple[float, float]:
        """Of the blocks that may leave, that with the lowest one leaves first; of equals the one unused for longest."""
        last_used_s = self._last_used_s[slot]
        return retention_value(self._class_of(slot), idle_s=max(0.0, now_s - last_used_s)), last_used_s

    def queue(self, slot: int) -> None:
        """The block may leave, as far as is known; no effect if it is queued already."""
        if not self._is_queued[slot]:
            self._is_queued[slot] = True
            heappush(self._queues.setdefault(self._class_of(slot), []), self._entry(slot))

    def next(self, *, now_s: float, may_leave: Callable[[int], bool]) -> int | None:
        """The slot of the least valuable block of those queued that may leave, which is queued no more."""
        for queue in tuple(self._queues.values()):
            self._settle_head(queue, may_leave)
        least, least_value = None, (float("inf"), 0)
        for of_class, queue in self._queues.items():
            if queue:
                idle_s = now_s - self._last_used_s[_slot_of(queue[0])]
                value = retention_value(of_class, idle_s=idle_s), queue[0]
                if value < least_value:
                    least, least_value = queue, value
        if least is None:
            return None
        slot = _slot_of(heappop(least))
        self._is_queued[slot] = False
        return slot

    def is_queued(self, slot: int) -> bool:
        return bool(self._is_queued[slot])

    def check(self) -> None:
        """That a slot is queued once or not at all, never later than it was last used."""
        entries = [entry for queue in self._queues.values() for entry in queue]
        assert sorted(map(_slot_of, entries)) == [
            n for n, is_queued in enumerate(self._is_queued) if is_queued
        ]
        assert all(entry >> _TIME_SHIFT <= self._last_used_bits[_slot_of(entry)] for entry in entries)

    def _settle_head(self, queue: list[int], may_leave: Callable[[int], bool]) -> None:
        while queue:
            slot = _slot_of(queue[0])
            is_idle = may_leave(slot)
            if is_idle and queue[0] == self._entry(slot):
                return
            heappop(queue)
            self._is_queued[slot] = False
            if is_idle:  # used since, or holding another block
                self.queue(slot)

    def _class_of(self, slot: int) -> int:
        return self._class_at(self._positions[slot])

    def _entry(self, slot: int) -> int:
        after_position = _LAST_POSITION - self._positions[slot]
        return self._last_used_bits[slot] << _TIME_SHIFT | after_position << _SLOT_BITS | slot


def _slot_of(entry: int) -> int:
    return entry & (1 << _SLOT_BITS) - 1
