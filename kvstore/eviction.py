"""In which order blocks leave: one queue for each class of recompute cost, compared by their heads."""

from array import array
from collections.abc import Callable
from heapq import heappop, heappush

from kvstore.placement import Policy, cost_class, retention_value


class EvictionOrder:
    """A queue is a heap of (last used, minus position, slot) in which an entry may be older than its slot's last use,
    never younger; it is put right when it comes to the head. Using a block therefore costs one store.
    """

    def __init__(self, num_slots: int, *, policy: Policy) -> None:
        self._policy = policy
        self._queues: dict[int, list[tuple[float, int, int]]] = {}
        self._last_used_s = array("d", [0.0]) * num_slots
        self._positions = array("l", [0]) * num_slots
        self._classes = array("b", [0]) * num_slots
        self._is_queued = bytearray(num_slots)

    def last_used_s(self, slot: int) -> float:
        return self._last_used_s[slot]

    def use(self, slot: int, *, at_s: float) -> None:
        self._last_used_s[slot] = at_s

    def place(self, slot: int, *, position: int, first_token: int, at_s: float) -> None:
        """The slot holds another block now."""
        self._last_used_s[slot] = at_s
        self._positions[slot] = position
        self._classes[slot] = cost_class(self._policy(first_token))

    def position(self, slot: int) -> int:
        return self._positions[slot]

    def queue(self, slot: int) -> None:
        """The block may leave, as far as is known; no effect if it is queued already."""
        if not self._is_queued[slot]:
            self._is_queued[slot] = True
            entry = (self._last_used_s[slot], -self._positions[slot], slot)
            heappush(self._queues.setdefault(self._classes[slot], []), entry)

    def next(self, *, now_s: float, may_leave: Callable[[int], bool]) -> int | None:
        """The slot of the least valuable block of those queued that may leave, which is queued no more."""
        for of_class in tuple(self._queues):
            self._settle_head(of_class, may_leave)
        least, least_value = None, float("inf")
        for of_class, queue in self._queues.items():
            if queue:
                value = retention_value(of_class, idle_s=now_s - queue[0][0])
                if least is None or (value, queue[0]) < (least_value, least[0]):
                    least, least_value = queue, value
        if least is None:
            return None
        _, _, slot = heappop(least)
        self._is_queued[slot] = False
        return slot

    def _settle_head(self, of_class: int, may_leave: Callable[[int], bool]) -> None:
        queue = self._queues[of_class]
        while queue:
            last_used_s, _, slot = queue[0]
            if not may_leave(slot):
                heappop(queue)
                self._is_queued[slot] = False
            elif last_used_s != self._last_used_s[slot] or of_class != self._classes[slot]:
                heappop(queue)  # used since, or holding another block
                self._is_queued[slot] = False
                self.queue(slot)
            else:
                return

    def is_queued(self, slot: int) -> bool:
        return bool(self._is_queued[slot])

    def check(self) -> None:
        """That a slot is queued once or not at all, never later than it was last used."""
        queued = sorted(slot for queue in self._queues.values() for _, _, slot in queue)
        assert queued == [slot for slot, is_queued in enumerate(self._is_queued) if is_queued]
