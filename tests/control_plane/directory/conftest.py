"""Gateways that share a directory over a real Redis, and workers that announce themselves to them."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from bench.redis_server import RedisServer
from control_plane.directory.block_events import BlockEvents
from control_plane.directory.errors import StaleEpoch, UnknownWorker
from control_plane.directory.member import Incarnation, Member, Model, Role, WorkerId, WorkerLoad
from control_plane.directory.memory import MemoryDirectory
from control_plane.directory.redis_directory import RedisDirectory
from control_plane.directory.redis_link import RedisLink, RedisSettings
from control_plane.directory.server import Directory, expire_silent
from kvstore.blocks import BlockKey
from kvstore.layout import KvLayout

WAIT_S = 10.0
HEARTBEAT_S, TTL_S = 0.02, 0.4

MODEL = Model(
    name="m",
    fingerprint=b"f",
    max_model_len=128,
    vocab_size=100,
    layout=KvLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32"),
)


def make_member(worker_id: str = "w", *, epoch: int = 1, role: Role = Role.DECODE) -> Member:
    return Member(
        worker_id=WorkerId(worker_id),
        epoch=epoch,
        role=role,
        control_address="127.0.0.1:1",
        data_address="tcp://127.0.0.1:2",
        model=MODEL,
    )


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(2, "little") * 8)


class Gateway:
    """What a gateway knows: `memory`. `directory` is what its workers speak to."""

    def __init__(self, memory: MemoryDirectory, directory: Directory, link: RedisLink | None) -> None:
        self.memory = memory
        self.directory = directory
        self.link = link
        self._tasks = [asyncio.create_task(expire_silent(directory))]
        if link is not None:
            self._tasks.append(asyncio.create_task(link.run()))

    def knows(self, worker: "Worker") -> bool:
        member = self.memory.get(worker.member.worker_id)
        return member is not None and member.epoch == worker.member.epoch

    def num_blocks(self, worker: "Worker", *numbers: int) -> int:
        overlap = self.memory.blocks.overlaps([key(number) for number in numbers]).get(
            worker.member.worker_id
        )
        return 0 if overlap is None else overlap.num_blocks

    async def stop(self) -> None:
        """As killed: nobody is told."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


class Worker:
    """Reports to one gateway as a real worker does: asked for its blocks it sends all, unknown it registers."""

    def __init__(self, gateway: Gateway, member: Member) -> None:
        self.gateway = gateway
        self.member = member
        self.num_registrations = 0
        self.num_running = 0
        self.num_snapshots = 0
        self.held: set[int] = set()
        self._new: set[int] = set()
        self._needs_snapshot = True
        self._sequence = itertools.count(1)
        self.register()
        self._task = asyncio.create_task(self._report())

    def register(self) -> None:
        self.num_registrations += 1
        self._needs_snapshot = True
        self.gateway.directory.register(self.member, now_s=time.monotonic())

    def hold(self, *numbers: int) -> None:
        self.held.update(numbers)
        self._new.update(numbers)

    def beat(self) -> None:
        snapshot, self._needs_snapshot = self._needs_snapshot, False
        self.num_snapshots += snapshot
        stored = sorted(self.held if snapshot else self._new)
        self._new.clear()
        self._needs_snapshot = self.gateway.directory.heartbeat(
            self.member.incarnation,
            load=WorkerLoad(num_running=self.num_running),
            blocks=BlockEvents(
                sequence=next(self._sequence), snapshot=snapshot, stored=b"".join(map(key, stored))
            ),
            now_s=time.monotonic(),
        )

    @property
    def is_refused(self) -> bool:
        """Whether it was told that another incarnation has taken its place."""
        return self._task.done() and isinstance(self._task.exception(), StaleEpoch)

    async def fall_silent(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _report(self) -> None:
        while True:
            try:
                self.beat()
            except UnknownWorker:
                self.register()
            await asyncio.sleep(HEARTBEAT_S)


class Site:
    """Several gateways and their workers; everything ends with the test."""

    def __init__(self, redis: RedisServer | None) -> None:
        self.redis = redis
        self.reached: set[Incarnation] = set()  # whom every gateway has an open session with
        self._gateways: list[Gateway] = []
        self._workers: list[Worker] = []

    def gateway(self, redis_url: str | None = None) -> Gateway:
        """Over another way to the same Redis, if one is named."""
        memory = MemoryDirectory(ttl_s=TTL_S, max_blocks=1 << 12)
        if self.redis is None:
            gateway = Gateway(memory, memory, None)
        else:
            directory = RedisDirectory(
                memory, gateway_id=f"gateway-{len(self._gateways)}", is_reached=self.reached.__contains__
            )
            settings = RedisSettings(
                url=redis_url or self.redis.url, prefix="test", heartbeat_s=HEARTBEAT_S, call_timeout_s=0.2
            )
            gateway = Gateway(memory, directory, RedisLink(directory, settings))
        self._gateways.append(gateway)
        return gateway

    def worker(self, gateway: Gateway, worker_id: str = "w", *, epoch: int = 1) -> Worker:
        worker = Worker(gateway, make_member(worker_id, epoch=epoch))
        self._workers.append(worker)
        return worker

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not holds():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def linked(self, *gateways: Gateway) -> None:
        await self.until(lambda: all(gateway.link is None or gateway.link.is_up for gateway in gateways))

    async def close(self) -> None:
        for worker in self._workers:
            await worker.fall_silent()
        for gateway in self._gateways:
            await gateway.stop()
            gateway.memory.check()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def site(redis: RedisServer) -> AsyncIterator[Site]:
    site = Site(redis)
    yield site
    await site.close()


@pytest.fixture(params=["embedded", "redis"])
async def any_site(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    """With Redis or without: what holds of one directory holds of the other."""
    site = Site(request.getfixturevalue("redis") if request.param == "redis" else None)
    yield site
    await site.close()
