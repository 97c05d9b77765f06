import asyncio

import pytest

from control_plane.errors import QueueFull
from control_plane.gateway.admission import MAX_RETRY_AFTER_S, Admission, AdmissionLimits
from control_plane.gateway.tenancy import Tenant

SOMEBODY, FLOOD, MODEST = Tenant(), Tenant("flood"), Tenant("modest")


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make_admission(
    *,
    max_concurrent: int = 1,
    max_queued: int = 1,
    max_queued_per_tenant: int | None = None,
    clock: Clock | None = None,
) -> Admission:
    limits = AdmissionLimits(
        max_concurrent=max_concurrent,
        max_queued=max_queued,
        max_queued_per_tenant=max_queued if max_queued_per_tenant is None else max_queued_per_tenant,
    )
    return Admission(limits, now_s=clock or Clock())


async def turn() -> None:
    """Lets everything that can run, run."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_the_place_of_one_who_leaves_goes_to_who_waits_longest() -> None:
    admission = make_admission(max_queued=2)
    await admission.enter(SOMEBODY)
    order: list[str] = []

    async def wait(name: str) -> None:
        await admission.enter(SOMEBODY)
        order.append(name)

    waiting = [asyncio.create_task(wait(name)) for name in ("first", "second")]
    await turn()
    assert (admission.num_running, admission.num_waiting) == (1, 2)
    admission.leave(SOMEBODY, has_completed=True)
    await turn()
    assert order == ["first"]
    admission.leave(SOMEBODY, has_completed=True)
    await asyncio.gather(*waiting)
    admission.leave(SOMEBODY, has_completed=True)
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_one_too_many_is_told_at_once() -> None:
    admission = make_admission(max_queued=0)
    await admission.enter(SOMEBODY)
    with pytest.raises(QueueFull) as refusal:
        await admission.enter(SOMEBODY)
    assert refusal.value.retry_after_s > 0


async def test_one_who_gives_up_waiting_leaves_no_trace() -> None:
    admission = make_admission()
    await admission.enter(SOMEBODY)
    waiting = asyncio.create_task(admission.enter(SOMEBODY))
    await turn()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert admission.num_waiting == 0
    admission.leave(SOMEBODY, has_completed=True)
    assert admission.num_running == 0


async def test_a_place_granted_to_one_who_just_gave_up_goes_to_the_next() -> None:
    admission = make_admission(max_queued=2)
    await admission.enter(SOMEBODY)
    quitter, patient = (
        asyncio.create_task(admission.enter(SOMEBODY)),
        asyncio.create_task(admission.enter(SOMEBODY)),
    )
    await turn()
    admission.leave(SOMEBODY, has_completed=True)  # grants the quitter's place ...
    quitter.cancel()  # ... which cannot run before it is cancelled
    await asyncio.gather(quitter, return_exceptions=True)
    await patient
    admission.leave(SOMEBODY, has_completed=True)
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_one_who_gives_up_while_a_place_is_handed_on_is_passed_over() -> None:
    admission = make_admission(max_queued=2)
    await admission.enter(SOMEBODY)
    quitter, patient = (
        asyncio.create_task(admission.enter(SOMEBODY)),
        asyncio.create_task(admission.enter(SOMEBODY)),
    )
    await turn()
    quitter.cancel()  # has not run yet ...
    admission.leave(SOMEBODY, has_completed=True)  # ... when the place is handed on
    await asyncio.wait([quitter])
    assert quitter.cancelled()
    await patient
    admission.leave(SOMEBODY, has_completed=True)
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_retry_after_follows_the_measured_rate_and_the_queue() -> None:
    clock = Clock()
    admission = make_admission(max_concurrent=10, clock=clock)
    for _ in range(10):
        await admission.enter(SOMEBODY)
    for _ in range(5):
        clock.now_s += 4.0
        admission.leave(SOMEBODY, has_completed=True)
        await admission.enter(SOMEBODY)
    assert admission.retry_after_s(SOMEBODY) == pytest.approx(4.0)
    clock.now_s += 16.0  # nothing completes any more
    assert admission.retry_after_s(SOMEBODY) == pytest.approx(8.0)
    clock.now_s += 10_000.0
    assert admission.retry_after_s(SOMEBODY) == MAX_RETRY_AFTER_S


async def test_time_in_which_places_were_free_does_not_make_the_rate_look_low() -> None:
    clock = Clock()
    admission = make_admission(max_concurrent=2, clock=clock)
    for pause_s in (3600.0, 0.0, 7200.0):
        clock.now_s += pause_s
        await admission.enter(SOMEBODY)
        clock.now_s += 1000.0  # one of two places is taken
        await admission.enter(SOMEBODY)
        clock.now_s += 3.0
        admission.leave(SOMEBODY, has_completed=True)
        clock.now_s += 500.0
        admission.leave(SOMEBODY, has_completed=True)
    for _ in range(2):
        await admission.enter(SOMEBODY)
    assert admission.retry_after_s(SOMEBODY) == pytest.approx(3.0)


async def test_aborted_requests_do_not_make_the_rate_look_high() -> None:
    clock = Clock()
    admission = make_admission(max_concurrent=1, clock=clock)
    for completed in (True, False, False, False, True):
        await admission.enter(SOMEBODY)
        clock.now_s += 5.0
        admission.leave(SOMEBODY, has_completed=completed)
    assert admission.retry_after_s(SOMEBODY) == pytest.approx(20.0)


class Crowd:
    """Waits for places in the name of tenants and notes who gets them."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.order: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def come(self, tenant: Tenant, num_requests: int) -> None:
        self.tasks += [asyncio.create_task(self._enter(tenant)) for _ in range(num_requests)]
        await turn()

    async def leave(self, tenant: Tenant) -> None:
        self.admission.leave(tenant, has_completed=True)
        await turn()

    async def _enter(self, tenant: Tenant) -> None:
        await self.admission.enter(tenant)
        self.order.append(tenant.name)


async def test_a_tenant_that_floods_keeps_others_waiting_for_no_more_than_the_next_place() -> None:
    crowd = Crowd(make_admission(max_concurrent=4, max_queued=20))
    await crowd.come(FLOOD, 12)
    await crowd.come(MODEST, 2)
    assert crowd.order == ["flood"] * 4
    for _ in range(3):
        await crowd.leave(FLOOD)
    assert crowd.order[4:] == ["modest", "modest", "flood"]


async def test_tenants_that_hold_as_many_places_take_turns() -> None:
    crowd = Crowd(make_admission(max_concurrent=1, max_queued=20))
    await crowd.come(FLOOD, 4)
    await crowd.come(MODEST, 2)
    for name in ("flood", "flood", "modest", "flood", "modest"):
        assert crowd.order[-1] == name
        await crowd.leave(FLOOD if name == "flood" else MODEST)


async def test_places_are_held_by_weight() -> None:
    heavy = Tenant("heavy", 3.0)
    crowd = Crowd(make_admission(max_concurrent=8, max_queued=40))
    await crowd.come(FLOOD, 20)
    await crowd.come(heavy, 10)
    for _ in range(8):
        await crowd.leave(FLOOD)
    assert (crowd.order[8:].count("heavy"), crowd.order[8:].count("flood")) == (6, 2)


async def test_a_tenant_whose_queue_is_full_is_refused_and_others_are_not() -> None:
    crowd = Crowd(make_admission(max_concurrent=1, max_queued=10, max_queued_per_tenant=3))
    await crowd.come(FLOOD, 4)
    with pytest.raises(QueueFull, match="3 requests of this tenant are waiting"):
        await crowd.admission.enter(FLOOD)
    await crowd.come(MODEST, 1)
    assert crowd.admission.num_waiting == 4


async def test_retry_after_is_the_tenants_own_turn() -> None:
    clock = Clock()
    crowd = Crowd(make_admission(max_concurrent=10, max_queued=40, clock=clock))
    await crowd.come(FLOOD, 30)
    for _ in range(5):
        clock.now_s += 2.0
        await crowd.leave(FLOOD)  # one in two seconds; fifteen still wait
    assert crowd.admission.num_waiting == 15
    assert crowd.admission.retry_after_s(FLOOD) == pytest.approx(2.0 * 16)
    assert crowd.admission.retry_after_s(MODEST) == pytest.approx(2.0 * 2)
    assert crowd.admission.retry_after_s(Tenant("light", 0.5)) == pytest.approx(2.0 * 3)
    await crowd.come(MODEST, 2)
    assert crowd.admission.retry_after_s(FLOOD) == pytest.approx(2.0 * 18)
    assert crowd.admission.retry_after_s(MODEST) == pytest.approx(2.0 * 6)


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(
        ValueError, match="max_queued_per_tenant must be between 0 and max_queued \\(1\\), got 2"
    ):
        make_admission(max_queued=1, max_queued_per_tenant=2)
