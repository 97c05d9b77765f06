"""Whoever is cancelled while a thread works for it goes on only when the thread has ended."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from workers.threads import run_to_end


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


class Work:
    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        self.is_done = False

    def __call__(self) -> int:
        self.began.set()
        self.go_on.wait()
        self.is_done = True
        return 7

    async def until_it_runs(self) -> None:
        await asyncio.to_thread(self.began.wait)


async def test_what_the_thread_returns_or_raises_comes_back(executor: ThreadPoolExecutor) -> None:
    work = Work()
    work.go_on.set()
    assert await run_to_end(executor, work) == 7
    with pytest.raises(ZeroDivisionError):
        await run_to_end(executor, lambda: 1 // 0)


async def test_a_cancelled_task_waits_for_its_thread_however_often_it_is_cancelled(
    executor: ThreadPoolExecutor,
) -> None:
    work = Work()
    task = asyncio.create_task(run_to_end(executor, work))
    await work.until_it_runs()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done()
    work.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.is_done


async def test_work_that_waits_for_its_turn_can_be_cancelled(executor: ThreadPoolExecutor) -> None:
    blocker, work = Work(), Work()
    first = asyncio.create_task(run_to_end(executor, blocker))
    await blocker.until_it_runs()
    second = asyncio.create_task(run_to_end(executor, work))
    await asyncio.sleep(0)
    second.cancel()
    blocker.go_on.set()
    work.go_on.set()
    await first
    with pytest.raises(asyncio.CancelledError):
        await second
