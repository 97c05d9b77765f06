import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from control_plane.directory import server as directory_server
from control_plane.directory.memory import MemoryDirectory
from control_plane.directory.server import SERVER_OPTIONS, DirectoryServicer, expire_silent
from protos import directory_pb2, directory_pb2_grpc, worker_pb2
from tests.control_plane.fake_worker import FakeWorker

TIMEOUT_S = 5.0
KINDS = directory_pb2.WatchEvent


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Service:
    stub: "directory_pb2_grpc.DirectoryAsyncStub"
    directory: MemoryDirectory
    clock: Clock

    async def register(self, worker_id: str = "w", *, epoch: int = 1) -> directory_pb2.RegisterReply:
        description = FakeWorker(worker_id, epoch=epoch).description
        description.control_address = "127.0.0.1:1"
        return await self.stub.Register(directory_pb2.RegisterRequest(worker=description), timeout=TIMEOUT_S)

    async def beat(self, **fields: object) -> directory_pb2.HeartbeatReply:
        request = directory_pb2.HeartbeatRequest(**{"worker_id": "w", "epoch": 1, **fields})
        return await self.stub.Heartbeat(request, timeout=TIMEOUT_S)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    directory, clock = MemoryDirectory(ttl_s=2.0), Clock()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    directory_pb2_grpc.add_DirectoryServicer_to_server(
        DirectoryServicer(directory, heartbeat_s=0.5, now_s=clock), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Service(directory_pb2_grpc.DirectoryStub(channel), directory, clock)
    await server.stop(None)


async def read(watch: grpc.aio.UnaryStreamCall) -> directory_pb2.WatchEvent:
    async with asyncio.timeout(TIMEOUT_S):
        event = await watch.read()
    assert isinstance(event, directory_pb2.WatchEvent), "the watch has ended"
    return event


async def drain(watch: grpc.aio.UnaryStreamCall) -> None:
    while True:
        await read(watch)


async def test_a_worker_learns_how_often_to_report(service: Service) -> None:
    reply = await service.register()
    assert (reply.heartbeat_s, reply.ttl_s) == (0.5, 2.0)
    assert [member.worker_id for member in service.directory.members()] == ["w"]


async def test_a_watcher_gets_the_present_members_then_every_change(service: Service) -> None:
    await service.register("early")
    watch = service.stub.Watch(directory_pb2.WatchRequest(), timeout=TIMEOUT_S)
    first, second = await read(watch), await read(watch)
    assert (first.kind, first.worker.worker_id, second.kind) == (KINDS.JOINED, "early", KINDS.SYNCED)
    await service.register("w")
    await service.beat(load=worker_pb2.WorkerLoad(num_running=7))
    await service.stub.Deregister(directory_pb2.DeregisterRequest(worker_id="w", epoch=1), timeout=TIMEOUT_S)
    events = [await read(watch) for _ in range(3)]
    assert [event.kind for event in events] == [KINDS.JOINED, KINDS.UPDATED, KINDS.LEFT]
    assert events[1].worker.load.num_running == 7
    watch.cancel()


async def test_a_watcher_that_does_not_keep_up_is_cut_off(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory_server, "MAX_QUEUED_CHANGES", 3)
    watch = service.stub.Watch(directory_pb2.WatchRequest(), timeout=TIMEOUT_S)
    assert (await read(watch)).kind == KINDS.SYNCED
    description = FakeWorker("w").description
    description.control_address = "127.0.0.1:1"
    for epoch in range(1, 6):  # without a turn of the loop: nothing is sent in between
        description.epoch = epoch
        service.directory.register(directory_server.wire.read_member(description), now_s=0.0)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await drain(watch)
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_watch_that_ends_leaves_no_listener(service: Service) -> None:
    watch = service.stub.Watch(directory_pb2.WatchRequest(), timeout=TIMEOUT_S)
    await read(watch)
    assert len(service.directory._listeners) == 1
    watch.cancel()
    async with asyncio.timeout(TIMEOUT_S):
        while service.directory._listeners:
            await service.register()  # a turn of both ends


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"worker_id": "nobody"}, grpc.StatusCode.NOT_FOUND),
        ({"epoch": 7}, grpc.StatusCode.FAILED_PRECONDITION),
        ({"blocks": directory_pb2.BlockEvents(stored=b"odd")}, grpc.StatusCode.INVALID_ARGUMENT),
        (
            {"blocks": directory_pb2.BlockEvents(stored=bytes(16), stored_tiers=b"\x07")},
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ],
)
async def test_a_heartbeat_that_does_not_fit_is_refused_with_the_reason(
    service: Service, fields: dict[str, object], code: grpc.StatusCode
) -> None:
    await service.register()
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await service.beat(**fields)
    assert failure.value.code() is code
    assert failure.value.details()


async def test_a_worker_of_no_role_cannot_register(service: Service) -> None:
    description = FakeWorker("w", role=worker_pb2.ROLE_UNSPECIFIED).description
    with pytest.raises(
        grpc.aio.AioRpcError, match="role of 'w' must be prefill, decode, mixed or store"
    ) as failure:
        await service.stub.Register(directory_pb2.RegisterRequest(worker=description), timeout=TIMEOUT_S)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_gap_in_the_block_events_is_answered_with_resend(service: Service) -> None:
    await service.register()
    assert (await service.beat(blocks=directory_pb2.BlockEvents(sequence=3, stored=bytes(16)))).resend_blocks
    snapshot = directory_pb2.BlockEvents(sequence=4, snapshot=True, stored=bytes(32))
    assert not (await service.beat(blocks=snapshot)).resend_blocks


async def test_workers_learn_of_the_stores_of_their_model_and_stores_of_none(service: Service) -> None:
    for name, fingerprint in (("s0", b"model-a"), ("s1", b"model-a"), ("other", b"model-b")):
        description = FakeWorker(
            name, role=worker_pb2.ROLE_STORE, epoch=3, fingerprint=fingerprint
        ).description
        description.control_address = f"127.0.0.1:{name}"
        await service.stub.Register(directory_pb2.RegisterRequest(worker=description), timeout=TIMEOUT_S)
    await service.register()
    stores = (await service.beat()).stores
    assert [(store.worker_id, store.epoch) for store in stores] == [("s0", 3), ("s1", 3)]
    assert stores[0].control_address == "127.0.0.1:s0"
    assert not (await service.beat(worker_id="s0", epoch=3)).stores


async def test_a_worker_that_drains_learns_of_its_pool_where_there_is_no_store(service: Service) -> None:
    async def register(name: str, **fields: Any) -> None:
        description = FakeWorker(name, epoch=3, **fields).description
        description.control_address = f"127.0.0.1:{name}"
        description.is_draining = name.startswith("draining")
        await service.stub.Register(directory_pb2.RegisterRequest(worker=description), timeout=TIMEOUT_S)

    for name in ("mixed-0", "mixed-1", "draining-0", "draining-1"):
        await register(name, role=worker_pb2.ROLE_MIXED)
    await register("decode-0", role=worker_pb2.ROLE_DECODE)
    await register("mixed-of-another-model", role=worker_pb2.ROLE_MIXED, fingerprint=b"model-b")
    takers = (await service.beat(worker_id="draining-0", epoch=3)).stores
    assert [taker.worker_id for taker in takers] == ["mixed-0", "mixed-1"]
    assert not (await service.beat(worker_id="mixed-0", epoch=3)).stores
    await register("s0", role=worker_pb2.ROLE_STORE)
    takers = (await service.beat(worker_id="draining-0", epoch=3)).stores
    assert [taker.worker_id for taker in takers] == ["s0"]


async def test_blocks_with_names_of_another_format_are_counted_and_not_indexed(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.directory.subscribe(directory_server.warn_of_other_formats)
    description = FakeWorker("w").description
    description.control_address = "127.0.0.1:1"
    description.block_format = b"penstock-block-0"
    for _ in range(2):
        await service.stub.Register(directory_pb2.RegisterRequest(worker=description), timeout=TIMEOUT_S)
    reply = await service.beat(blocks=directory_pb2.BlockEvents(sequence=1, snapshot=True, stored=bytes(16)))
    assert not reply.resend_blocks
    assert service.directory.blocks.is_empty
    assert service.directory.num_format_mismatches == 1
    (record,) = [record for record in caplog.records if record.message == "block_format_mismatch"]
    assert record.fields["block_format"] == "penstock-block-0"
    assert [member.worker_id for member in service.directory.members()] == ["w"]


async def test_a_heartbeat_with_a_hundred_thousand_blocks_lets_others_speak(service: Service) -> None:
    await service.register()
    blocks = directory_pb2.BlockEvents(sequence=1, snapshot=True, stored=random.Random(1).randbytes(16 << 17))
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    assert not (await service.beat(blocks=blocks)).resend_blocks
    counting.cancel()
    assert turns > 256
    assert service.directory.blocks.num_blocks == 1 << 17


def frozen_directory(*, ttl_s: float, now_s: float) -> MemoryDirectory:
    """With one member that never says anything again."""
    directory = MemoryDirectory(ttl_s=ttl_s)
    description = FakeWorker("w").description
    description.control_address = "127.0.0.1:1"
    directory.register(directory_server.wire.read_member(description), now_s=now_s)
    return directory


async def test_silence_is_noticed_without_anybody_calling() -> None:
    directory = frozen_directory(ttl_s=0.05, now_s=time.monotonic())
    left = asyncio.Event()
    directory.subscribe(lambda change: left.set())
    expiry = asyncio.create_task(expire_silent(directory))
    async with asyncio.timeout(TIMEOUT_S):
        await left.wait()
    assert directory.members() == ()
    expiry.cancel()
    await asyncio.wait([expiry])


async def test_nobody_counts_as_silent_while_the_directory_itself_was_frozen() -> None:
    directory, clock = frozen_directory(ttl_s=0.02, now_s=0.0), Clock()
    rounds = [asyncio.Event() for _ in range(5)]
    readings = iter(rounds)

    def now_s() -> float:
        next(readings, rounds[-1]).set()
        return clock.now_s

    expiry = asyncio.create_task(expire_silent(directory, now_s=now_s))
    await rounds[0].wait()
    clock.now_s = 100.0  # as after SIGSTOP and SIGCONT of this process
    async with asyncio.timeout(TIMEOUT_S):
        await rounds[-1].wait()
    assert [member.worker_id for member in directory.members()] == ["w"]
    directory.check()
    expiry.cancel()
    await asyncio.wait([expiry])


async def test_a_dead_worker_leaves_within_three_seconds_although_every_check_is_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its clock; each check, due every 0.25 s, comes as late as in a starved process."""
    clock, left_s = Clock(), asyncio.get_running_loop().create_future()
    directory = frozen_directory(ttl_s=2.0, now_s=0.0)
    directory.subscribe(lambda change: left_s.set_result(clock.now_s))

    async def sleep_too_long(interval_s: float) -> None:
        clock.now_s += interval_s + 0.45
        await sleep(0)

    sleep = asyncio.sleep
    monkeypatch.setattr(directory_server.asyncio, "sleep", sleep_too_long)
    expiry = asyncio.create_task(expire_silent(directory, now_s=clock))
    async with asyncio.timeout(TIMEOUT_S):
        assert 2.0 <= await left_s < 3.0
    expiry.cancel()
    await asyncio.wait([expiry])
