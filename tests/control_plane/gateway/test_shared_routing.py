"""Two gateways over one Redis and the same workers: who is told what by whom does not matter to a request."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bench.redis_server import RedisServer
from control_plane.directory.block_events import BlockEvents
from control_plane.directory.member import WorkerLoad
from control_plane.directory.memory import MemoryDirectory
from control_plane.directory.redis_directory import RedisDirectory
from control_plane.directory.redis_link import RedisLink, RedisSettings
from control_plane.gateway.sessions import SessionPool, SessionSettings
from control_plane.generation import Generation
from kvstore.blocks import chain_keys, root_key
from protos import worker_pb2
from tests.control_plane.fake_cluster import Cluster, collect, make_generation
from tests.control_plane.fake_worker import WAIT_S, FakeWorker, expected_tokens

LONG = 200


class SharedCluster:
    """Gateways with everything but the public face; workers report to the first."""

    def __init__(self, redis: RedisServer) -> None:
        self.redis = redis
        self.clusters: list[Cluster] = []
        self.directories: list[RedisDirectory] = []
        self.workers: list[FakeWorker] = []
        self._tasks: list[asyncio.Task[None]] = []

    def add_gateway(self) -> None:
        memory = MemoryDirectory(ttl_s=60.0)
        name = f"gateway-{len(self.clusters)}"
        sessions = SessionPool(SessionSettings(gateway_id=name))
        directory = RedisDirectory(memory, gateway_id=name, is_reached=sessions.is_ready)
        memory.subscribe(sessions.on_change)
        settings = RedisSettings(url=self.redis.url, prefix="test", heartbeat_s=0.02)
        self._tasks.append(asyncio.create_task(RedisLink(directory, settings).run()))
        self.clusters.append(Cluster(memory, sessions))
        self.directories.append(directory)

    async def start(self, worker: FakeWorker) -> FakeWorker:
        await worker.start()
        self.workers.append(worker)
        self.directories[0].register(worker.member, now_s=time.monotonic())
        if worker.member.role.value != "store":
            await self.until(lambda: all(cluster.is_ready(worker) for cluster in self.clusters))
        return worker

    async def hold(self, worker: FakeWorker, generation: Generation) -> None:
        root = root_key(model_fingerprint=worker.description.model.fingerprint)
        keys = tuple(chain_keys(root, generation.prompt_token_ids))
        self.directories[0].heartbeat(
            worker.member.incarnation,
            load=WorkerLoad(num_pages=1024, num_free_pages=1024),
            blocks=BlockEvents(sequence=1, snapshot=True, stored=b"".join(keys)),
            now_s=time.monotonic(),
        )
        await self.until(
            lambda: all(
                worker.member.worker_id in cluster.directory.blocks.overlaps(keys)
                for cluster in self.clusters
            )
        )

    async def until(self, holds: object) -> None:
        assert callable(holds)
        async with asyncio.timeout(WAIT_S):
            while not holds():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        for cluster in self.clusters:
            await cluster.sessions.close()
        for worker in self.workers:
            await worker.stop()


@pytest.fixture
async def shared(tmp_path: Path) -> AsyncIterator[SharedCluster]:
    redis = RedisServer(tmp_path)
    redis.start()
    shared = SharedCluster(redis)
    shared.add_gateway()
    shared.add_gateway()
    yield shared
    await shared.close()
    redis.kill()


async def test_both_gateways_route_to_the_same_holder_of_a_prefix(shared: SharedCluster) -> None:
    cold = await shared.start(FakeWorker("a-cold"))
    warm = await shared.start(FakeWorker("warm"))
    generation = make_generation(num_prompt_tokens=LONG)
    await shared.hold(warm, generation)
    for cluster in shared.clusters:
        chunks = await collect(cluster.dispatcher(), generation)
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        assert tokens == expected_tokens(generation.prompt_token_ids, 4)
    assert (len(warm.submits), len(cold.submits)) == (2, 0)


async def test_both_gateways_serve_on_when_redis_is_killed(shared: SharedCluster) -> None:
    worker = await shared.start(FakeWorker("w"))
    shared.redis.kill()
    for cluster in shared.clusters:
        assert await collect(cluster.dispatcher(), make_generation())
    assert len(worker.submits) == 2


async def test_a_store_is_hinted_at_by_both_gateways_and_gets_no_session(shared: SharedCluster) -> None:
    worker = await shared.start(FakeWorker("w"))
    store = await shared.start(FakeWorker("s", role=worker_pb2.ROLE_STORE, epoch=9))
    generation = make_generation(num_prompt_tokens=LONG)
    await shared.hold(store, generation)
    for cluster in shared.clusters:
        await collect(cluster.dispatcher(), generation)
    for submit in worker.submits:
        (holder,) = submit.kv_holders
        assert (holder.worker_id, holder.epoch, holder.num_blocks) == ("s", 9, (LONG - 1) // 16)
        assert holder.control_address == store.description.control_address
    assert store.hellos == []
