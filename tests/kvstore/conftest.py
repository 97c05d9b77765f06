"""Both event loops that serve in production, proof that a test leaves no socket and no task behind, and a store."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping

import psutil
import pytest_asyncio
import uvloop

from kvstore.store import BlockStore
from tests.kvstore.scripted_disk import ScriptedDisk, nothing_is_held, open_store, until


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


@pytest_asyncio.fixture
async def disk() -> AsyncIterator[ScriptedDisk]:
    scripted = ScriptedDisk()
    before = set(threading.enumerate())
    yield scripted
    await until(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith("kv-disk")])


@pytest_asyncio.fixture
async def store(disk: ScriptedDisk) -> AsyncIterator[BlockStore]:
    """Eight slots over a disk."""
    opened = open_store(8, disk=disk)
    yield opened
    disk.go.set()
    await opened.close()
    assert disk.is_closed
    nothing_is_held(opened)
