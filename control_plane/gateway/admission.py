"""How many generations run at a time, how many wait, and what those who may not even wait are told.

A free place goes to the tenant that holds the fewest for its weight, and within a tenant to whoever came first. So one
that floods keeps others waiting for no more than the next place.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from control_plane.errors import QueueFull
from control_plane.gateway.tenancy import Tenant

# The rate of completions is measured over so many of the last ones.
NUM_REMEMBERED_COMPLETIONS = 64
FIRST_RETRY_AFTER_S = 1.0  # before anything was measured
MAX_RETRY_AFTER_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmissionLimits:
    max_concurrent: int
    max_queued: int  # of all tenants
    max_queued_per_tenant: int

    def __post_init__(self) -> None:
        if not 0 <= self.max_queued_per_tenant <= self.max_queued:
            raise ValueError(
                f"max_queued_per_tenant must be between 0 and max_queued ({self.max_queued}),"
                f" got {self.max_queued_per_tenant}"
            )


class Admission:
    """Every `enter` that returns must be followed by one `leave` of the same tenant."""

    def __init__(self, limits: AdmissionLimits, *, now_s: Callable[[], float]) -> None:
        self._limits = limits
        self._now_s = now_s
        self._num_running: Counter[str] = Counter()  # by tenant; none is zero
        self._waiters: dict[
            Tenant, deque[asyncio.Future[None]]
        ] = {}  # none is empty; who had no turn for longest first
        # How long all places were taken, without and since `_full_since_s`: how fast places come free is seen then
        # alone. While some are free, fewer complete because fewer come.
        self._full_s = 0.0
        self._full_since_s: float | None = None
        self._completions_s: deque[float] = deque(maxlen=NUM_REMEMBERED_COMPLETIONS)  # by that clock

    @property
    def num_running(self) -> int:
        return self._num_running.total()

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiters.values()))

    async def enter(self, tenant: Tenant) -> None:
        """Waits for a place. Raises QueueFull if nobody more may wait, of this tenant or at all."""
        if self.num_running < self._limits.max_concurrent:
            self._num_running[tenant.name] += 1
            self._note_whether_full()
            return
        self._refuse_if_full(tenant)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(tenant, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._give_up(tenant)  # it was granted in the same turn of the loop
                self._hand_on()
                self._note_whether_full()
            elif place in self._waiters.get(
                tenant, ()
            ):  # else it was passed over in the same turn of the loop
                self._forget_waiter(tenant, place)
            raise

    def leave(self, tenant: Tenant, *, has_completed: bool) -> None:
        """Aborted and failed requests say nothing about how long the others take."""
        if has_completed and self._full_since_s is not None:
            self._completions_s.append(self._time_full_s())
        self._give_up(tenant)
        self._hand_on()
        self._note_whether_full()

    def retry_after_s(self, tenant: Tenant) -> float:
        """When this tenant's next request would have its turn, by the completions of the last while.

        All that waits of its own goes before, and of each other tenant as much as the weights give it by then.
        """
        if len(self._completions_s) < 2:
            return FIRST_RETRY_AFTER_S
        # Until now, not until the last completion: if nothing completes any more, the rate falls.
        elapsed_s = self._time_full_s() - self._completions_s[0]
        seconds_per_completion = elapsed_s / (len(self._completions_s) - 1)
        num_own = len(self._waiters.get(tenant, ())) + 1
        num_others = sum(
            min(len(places), num_own * other.weight / tenant.weight)
            for other, places in self._waiters.items()
            if other != tenant
        )
        wait_s = seconds_per_completion * (num_own + num_others)
        return min(max(wait_s, FIRST_RETRY_AFTER_S), MAX_RETRY_AFTER_S)

    def _refuse_if_full(self, tenant: Tenant) -> None:
        num_own, num_waiting = len(self._waiters.get(tenant, ())), self.num_waiting
        if num_waiting >= self._limits.max_queued:
            message = (
                f"{self.num_running} requests are running and {num_waiting} are waiting; try again later"
            )
        elif num_own >= self._limits.max_queued_per_tenant:
            message = f"{num_own} requests of this tenant are waiting, the most that may; try again later"
        else:
            return
        raise QueueFull(message, retry_after_s=self.retry_after_s(tenant))

    def _time_full_s(self) -> float:
        return self._full_s + (0.0 if self._full_since_s is None else self._now_s() - self._full_since_s)

    def _note_whether_full(self) -> None:
        is_full = self.num_running >= self._limits.max_concurrent
        if is_full and self._full_since_s is None:
            self._full_since_s = self._now_s()
        elif not is_full and self._full_since_s is not None:
            self._full_s, self._full_since_s = self._time_full_s(), None

    def _give_up(self, tenant: Tenant) -> None:
        self._num_running[tenant.name] -= 1
        if not self._num_running[tenant.name]:
            del self._num_running[tenant.name]

    def _hand_on(self) -> None:
        """A free place goes to one who waits, so that nobody who comes now overtakes."""
        while self._waiters and self.num_running < self._limits.max_concurrent:
            tenant = min(self._waiters, key=lambda tenant: self._num_running[tenant.name] / tenant.weight)
            place = self._waiters[tenant][0]
            self._forget_waiter(tenant, place)
            if not place.done():
                self._num_running[tenant.name] += 1
                place.set_result(None)
                if tenant in self._waiters:  # behind the others that hold as many
                    self._waiters[tenant] = self._waiters.pop(tenant)

    def _forget_waiter(self, tenant: Tenant, place: asyncio.Future[None]) -> None:
        places = self._waiters[tenant]
        places.remove(place)
        if not places:
            del self._waiters[tenant]
