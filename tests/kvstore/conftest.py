"""Both event loops that serve in production, and proof that a test leaves no socket and no task behind."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import psutil
import pytest_asyncio
import uvloop


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest_asyncio.fixture
async def nothing_is_left() -> AsyncIterator[None]:
    """The same open files and tasks before and after."""
    process = psutil.Process()
    await asyncio.sleep(0)
    num_fds, tasks = process.num_fds(), asyncio.all_tasks()
    yield
    await asyncio.sleep(0)  # done callbacks of the last task
    assert asyncio.all_tasks() - tasks - {asyncio.current_task()} == set()
    assert process.num_fds() <= num_fds  # fewer: a server of an earlier test has closed at last
