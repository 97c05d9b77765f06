import asyncio
import threading

import pytest

from kvstore.disk_io import IoThread

pytestmark = pytest.mark.usefixtures("nothing_is_left")
SOON_S = 5.0


def named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


async def test_jobs_are_done_in_order_by_one_thread_that_ends_with_its_owner() -> None:
    thread = IoThread("io-in-order", max_jobs=10)
    jobs = [thread.submit(lambda number=number: (number, threading.get_ident())) for number in range(5)]
    results = [await job for job in jobs if job is not None]
    assert [number for number, _ in results] == list(range(5))
    assert {ident for _, ident in results} == {found.ident for found in named("io-in-order")}
    await thread.close(timeout_s=SOON_S)
    await thread.close(timeout_s=SOON_S)
    assert named("io-in-order") == []
    assert thread.submit(lambda: None) is None


async def test_what_a_job_raises_comes_to_whoever_waits_and_the_thread_goes_on() -> None:
    thread = IoThread("io-raises", max_jobs=2)
    failing = thread.submit(lambda: 1 // 0)
    assert failing is not None
    with pytest.raises(ZeroDivisionError):
        await failing
    again = thread.submit(lambda: "fine")
    assert again is not None
    assert await again == "fine"
    await thread.close(timeout_s=SOON_S)


async def test_too_many_jobs_are_refused_until_one_is_done() -> None:
    thread, go = IoThread("io-bounded", max_jobs=2), threading.Event()
    jobs = [thread.submit(go.wait) for _ in range(3)]
    assert [job is None for job in jobs] == [False, False, True]
    go.set()
    for job in jobs[:2]:
        assert job is not None
        await job
    assert thread.submit(go.wait) is not None
    await thread.close(timeout_s=SOON_S)


async def test_a_cancelled_wait_does_not_stop_the_job() -> None:
    thread, go = IoThread("io-cancelled", max_jobs=2), threading.Event()
    job = thread.submit(go.wait)
    assert job is not None
    job.cancel()
    go.set()
    after = thread.submit(lambda: "after")
    assert after is not None
    assert await after == "after"
    await thread.close(timeout_s=SOON_S)


async def test_closing_leaves_a_thread_that_hangs_behind(caplog: pytest.LogCaptureFixture) -> None:
    thread, go = IoThread("io-hangs", max_jobs=2), threading.Event()
    job = thread.submit(go.wait)
    await thread.close(timeout_s=0.02)
    assert "io-hangs still waits for its disk after 0.02 s" in caplog.text
    assert all(found.daemon for found in named("io-hangs"))
    go.set()
    assert job is not None
    await asyncio.wait_for(job, SOON_S)
