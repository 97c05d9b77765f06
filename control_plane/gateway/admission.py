"""How many generations run at a time, how many wait, and what those who may not even wait are told."""

import asyncio
from collections import deque
from collections.abc import Callable

from control_plane.errors import QueueFull

# The rate of completions is measured over so many of the last ones.
NUM_REMEMBERED_COMPLETIONS = 64
FIRST_RETRY_AFTER_S = 1.0  # before anything was measured
MAX_RETRY_AFTER_S = 60.0


class Admission:
    """First come, first served. Every `enter` that returns must be followed by one `leave`."""

    def __init__(self, *, max_concurrent: int, max_queued: int, now_s: Callable[[], float]) -> None:
        self._max_concurrent = max_concurrent
        self._max_queued = max_queued
        self._now_s = now_s
        self._num_running = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._completions_s: deque[float] = deque(maxlen=NUM_REMEMBERED_COMPLETIONS)

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_waiting(self) -> int:
        return len(self._waiters)

    async def enter(self) -> None:
        """Waits for a place. Raises QueueFull if nobody more may wait."""
        if self._num_running < self._max_concurrent:
            self._num_running += 1
            return
        if len(self._waiters) >= self._max_queued:
            raise QueueFull(
                f"{self._num_running} requests are running and {len(self._waiters)} are waiting; try again later",
                retry_after_s=self.retry_after_s(),
            )
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._hand_on()  # it was granted in the same turn of the loop
            elif place in self._waiters:  # or else it was passed over in the same turn of the loop
                self._waiters.remove(place)
            raise

    def leave(self, *, has_completed: bool) -> None:
        """Aborted and failed requests say nothing about how long the others take."""
        if has_completed:
            self._completions_s.append(self._now_s())
        self._hand_on()

    def retry_after_s(self) -> float:
        """When a place in the queue should be free, judged by the completions of the last while."""
        if len(self._completions_s) < 2:
            return FIRST_RETRY_AFTER_S
        # Until now, not until the last completion: if nothing completes any more, the rate falls.
        elapsed_s = self._now_s() - self._completions_s[0]
        seconds_per_completion = elapsed_s / (len(self._completions_s) - 1)
        return min(
            max(seconds_per_completion * (len(self._waiters) + 1), FIRST_RETRY_AFTER_S), MAX_RETRY_AFTER_S
        )

    def _hand_on(self) -> None:
        """The place goes to the first who waits, so that nobody who comes now overtakes."""
        while self._waiters:
            place = self._waiters.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._num_running -= 1
