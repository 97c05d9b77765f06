"""Fixtures of all tests of the control plane."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from control_plane.directory.memory import MemoryDirectory
from control_plane.gateway.sessions import SessionPool, SessionSettings
from tests.control_plane.fake_cluster import Cluster


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    directory = MemoryDirectory(ttl_s=2.0)
    sessions = SessionPool(SessionSettings(gateway_id="gateway-under-test"))
    directory.subscribe(sessions.on_change)
    cluster = Cluster(directory, sessions)
    yield cluster
    await sessions.close()
    for worker in cluster.workers:
        await worker.stop()
    left = [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("session with")]
    assert not left
