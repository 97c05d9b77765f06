import asyncio

import pytest

from control_plane.errors import QueueFull
from control_plane.gateway.admission import MAX_RETRY_AFTER_S, Admission


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make_admission(*, max_concurrent: int = 1, max_queued: int = 1, clock: Clock | None = None) -> Admission:
    return Admission(max_concurrent=max_concurrent, max_queued=max_queued, now_s=clock or Clock())


async def turn() -> None:
    """Lets everything that can run, run."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_the_place_of_one_who_leaves_goes_to_who_waits_longest() -> None:
    admission = make_admission(max_queued=2)
    await admission.enter()
    order: list[str] = []

    async def wait(name: str) -> None:
        await admission.enter()
        order.append(name)

    waiting = [asyncio.create_task(wait(name)) for name in ("first", "second")]
    await turn()
    assert (admission.num_running, admission.num_waiting) == (1, 2)
    admission.leave(has_completed=True)
    await turn()
    assert order == ["first"]
    admission.leave(has_completed=True)
    await asyncio.gather(*waiting)
    admission.leave(has_completed=True)
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_one_too_many_is_told_at_once() -> None:
    admission = make_admission(max_queued=0)
    await admission.enter()
    with pytest.raises(QueueFull) as refusal:
        await admission.enter()
    assert refusal.value.retry_after_s > 0


async def test_one_who_gives_up_waiting_leaves_no_trace() -> None:
    admission = make_admission()
    await admission.enter()
    waiting = asyncio.create_task(admission.enter())
    await turn()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert admission.num_waiting == 0
    admission.leave(has_completed=True)
    assert admission.num_running == 0


async def test_a_place_granted_to_one_who_just_gave_up_goes_to_the_next() -> None:
    admission = make_admission(max_queued=2)
    await admission.enter()
    quitter, patient = asyncio.create_task(admission.enter()), asyncio.create_task(admission.enter())
    await turn()
    admission.leave(has_completed=True)  # grants the quitter's place ...
    quitter.cancel()  # ... which cannot run before it is cancelled
    await asyncio.gather(quitter, return_exceptions=True)
    await patient
    admission.leave(has_completed=True)
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_one_who_gives_up_while_a_place_is_handed_on_is_passed_over() -> None:
    admission = make_admission(max_queued=2)
    await admission.enter()
    quitter, patient = asyncio.create_task(admission.enter()), asyncio.create_task(admission.enter())
    await turn()
    quitter.cancel()  # has not run yet ...
    admission.leave(has_completed=True)  # ... when the place is handed on
    await asyncio.wait([quitter])
    assert quitter.cancelled()
    await patient
    admission.leave(has_completed=True)
    assert (admission.num_running, admission.num_waiting) == (0, 0)


async def test_retry_after_follows_the_measured_rate_and_the_queue() -> None:
    clock = Clock()
    admission = make_admission(max_concurrent=10, clock=clock)
    for _ in range(10):
        await admission.enter()
    for _ in range(5):
        clock.now_s += 4.0
        admission.leave(has_completed=True)
    assert admission.retry_after_s() == pytest.approx(4.0)
    clock.now_s += 16.0  # nothing completes any more
    assert admission.retry_after_s() == pytest.approx(8.0)
    clock.now_s += 10_000.0
    assert admission.retry_after_s() == MAX_RETRY_AFTER_S


async def test_aborted_requests_do_not_make_the_rate_look_high() -> None:
    clock = Clock()
    admission = make_admission(max_concurrent=100, clock=clock)
    for completed in (True, False, False, False, True):
        await admission.enter()
        clock.now_s += 5.0
        admission.leave(has_completed=completed)
    assert admission.retry_after_s() == pytest.approx(20.0)
