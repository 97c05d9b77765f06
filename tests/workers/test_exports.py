"""Leases and tickets: how long a source keeps what it computed, and for whom."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from kvstore.addresses import parse_address
from kvstore.data_plane import Connection, connect
from kvstore.frames import FrameKind
from kvstore.transfer import send_payload
from protos import kv_pb2, kv_pb2_grpc
from tests.workers.handoff_ends import (
    EPOCH,
    FINGERPRINT,
    ID,
    LAYOUT,
    SOON_S,
    SOURCE_PAGES,
    Source,
    running_source,
)
from workers.exports import ExportLimits, NoSuchExport
from workers.handoff_wire import layout_to_wire
from workers.request import RequestId


@pytest_asyncio.fixture
async def source() -> AsyncIterator[Source]:
    async with running_source(ExportLimits(lease_s=10.0)) as made:
        yield made


class Clock:
    """The event loop's clock, moved by hand."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.now_s = loop.time()

    async def move(self, seconds: float) -> None:
        self.now_s += seconds
        for _ in range(3):  # a timer that is due, and what it wakes
            await asyncio.sleep(0)


@pytest_asyncio.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    loop = asyncio.get_running_loop()
    made = Clock(loop)
    monkeypatch.setattr(loop, "time", lambda: made.now_s)
    return made


def unserved(*, lease_s: float = 10.0) -> Source:
    """Exports without sockets, for tests that move the clock."""
    return Source(limits=ExportLimits(lease_s=lease_s))


@contextlib.asynccontextmanager
async def control(source: Source) -> AsyncIterator["kv_pb2_grpc.KvTransferAsyncStub"]:
    async with grpc.aio.insecure_channel(source.control_address) as channel:
        yield kv_pb2_grpc.KvTransferStub(channel)


def pull_request() -> kv_pb2.PullRequest:
    return kv_pb2.PullRequest(
        request_id=ID, source_epoch=EPOCH, model_fingerprint=FINGERPRINT, layout=layout_to_wire(LAYOUT)
    )


async def test_a_lease_that_nobody_uses_runs_out(clock: Clock) -> None:
    source = unserved()
    source.open()
    source.finish()
    await clock.move(9.9)
    assert source.ended.empty()
    await clock.move(0.2)
    assert source.ended.get_nowait() == ("expired", ID)
    assert source.exports.num_open == source.exports.num_leases == 0
    with pytest.raises(NoSuchExport, match="lease is over"):
        await source.exports.issue_ticket(ID, first_block=0, timeout_s=1.0)


async def test_a_prefill_that_still_runs_has_no_lease_to_lose(clock: Clock) -> None:
    source = unserved()
    source.open()
    source.progress(50)
    await clock.move(1000.0)
    assert source.ended.empty()
    source.finish()
    await clock.move(10.1)
    assert source.ended.get_nowait() == ("expired", ID)


async def test_progress_of_the_puller_renews_the_lease(clock: Clock) -> None:
    source = unserved()
    source.open()
    source.finish()
    for _ in range(5):
        await clock.move(9.0)
        await source.exports.issue_ticket(ID, first_block=0, timeout_s=1.0)
    assert source.ended.empty()
    await clock.move(10.1)
    assert source.ended.get_nowait() == ("expired", ID)


async def test_every_frame_that_is_taken_renews_the_lease(clock: Clock) -> None:
    source = unserved()
    source.open()
    source.finish()
    ours, theirs = socket.socketpair()
    with (
        Connection(ours, peer="the puller", idle_timeout_s=100.0) as ours_connected,
        Connection(theirs, peer="the source", idle_timeout_s=100.0),
    ):
        issued = await source.exports.issue_ticket(ID, first_block=0, timeout_s=1.0)
        await clock.move(9.0)
        assert await source.exports.serve(ours_connected, issued.ticket)  # all of it fits the socket's buffer
        await clock.move(9.0)
        assert source.ended.empty()
        await clock.move(1.1)
        assert source.ended.get_nowait() == ("expired", ID)


@pytest.mark.parametrize("comes_again", [False, True])
async def test_a_puller_that_has_gone_pulls_no_more_unless_it_comes_again(comes_again: bool) -> None:
    source = unserved()
    source.open()
    assert not source.exports.is_pulled(ID)
    issued = await source.exports.issue_ticket(ID, first_block=0, timeout_s=1.0)
    ours, theirs = socket.socketpair()
    with Connection(ours, peer="the puller", idle_timeout_s=100.0) as connection:
        serving = asyncio.create_task(source.exports.serve(connection, issued.ticket))
        await asyncio.sleep(0)
        assert source.exports.is_pulled(ID)
        theirs.close()
        if comes_again:
            await source.exports.issue_ticket(ID, first_block=0, timeout_s=1.0)
        source.finish()
        assert await serving
    assert source.exports.is_pulled(ID) is comes_again
    source.exports.close_all()


async def test_an_export_that_is_closed_calls_nothing_back(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    source = unserved()
    source.open()
    source.finish()
    source.exports.close(ID)
    source.exports.close(ID)
    source.exports.release(ID)
    await clock.move(1000.0)
    assert source.ended.empty()
    assert source.exports.num_open == 0
    assert caplog.records == []  # no timer was left that found nothing


async def test_news_of_an_export_that_is_gone_is_ignored() -> None:
    source = unserved()
    source.progress(50)
    source.finish()
    source.exports.layer_progress(ID, page_ids=SOURCE_PAGES, num_ready_tokens=16, num_layers=1)
    source.exports.release(ID)
    assert source.exports.num_open == 0
    assert source.ended.empty()


async def test_an_id_can_be_exported_again_after_its_end_but_not_twice_at_once() -> None:
    source = unserved()
    source.open()
    with pytest.raises(ValueError, match="exported already"):
        source.open()
    source.exports.close(ID)
    source.open()
    await source.exports.issue_ticket(ID, first_block=0, timeout_s=1.0)
    source.exports.close_all()


async def test_what_is_remembered_of_closed_exports_is_bounded() -> None:
    source = Source(limits=ExportLimits(lease_s=10.0, num_remembered=2, max_waiting_pulls=1))
    for number in range(5):
        source.exports.close(RequestId(f"request-{number}"))
    waiting = asyncio.create_task(
        source.exports.issue_ticket(RequestId("request-0"), first_block=0, timeout_s=1.0)
    )
    await asyncio.sleep(0)
    assert source.exports.num_waiting_pulls == 1  # forgotten, so it may still come
    for forgotten_or_not in ("request-1", "request-4"):  # no room to wait; known to be gone
        with pytest.raises(NoSuchExport):
            await source.exports.issue_ticket(RequestId(forgotten_or_not), first_block=0, timeout_s=1.0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert source.exports.num_waiting_pulls == 0


async def test_a_first_block_beyond_the_prompt_is_invalid(source: Source) -> None:
    source.open()
    request = pull_request()
    request.first_block = 8
    async with control(source) as stub:
        with pytest.raises(grpc.aio.AioRpcError, match="between 0 and 7, got 8") as raised:
            await stub.Pull(request, timeout=SOON_S)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "wrong", [{"lease_s": 0.0}, {"open_wait_s": -1.0}, {"keep_alive_s": 0.1}, {"num_remembered": 0}]
)
def test_limits_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ExportLimits(**{"lease_s": 10.0, **wrong})  # type: ignore[arg-type]


async def test_release_is_idempotent_and_bound_to_its_epoch(source: Source) -> None:
    source.open()
    source.finish()
    async with control(source) as stub:
        stale = kv_pb2.ReleaseRequest(request_id=ID, source_epoch=76)
        with pytest.raises(grpc.aio.AioRpcError, match="for epoch 76, this worker is epoch 77"):
            await stub.Release(stale, timeout=SOON_S)
        assert source.exports.num_leases == 1
        for _ in range(3):
            await stub.Release(kv_pb2.ReleaseRequest(request_id=ID, source_epoch=EPOCH), timeout=SOON_S)
    assert await source.next_end() == ("released", ID)
    assert source.ended.empty()


async def test_a_release_before_the_end_of_the_prefill_takes_effect_at_its_end(source: Source) -> None:
    source.open()
    source.exports.release(ID)
    assert source.ended.empty()
    source.finish()
    assert source.ended.get_nowait() == ("released", ID)


async def test_a_ticket_is_good_for_one_connection(source: Source) -> None:
    source.open()
    source.finish()
    async with control(source) as stub:
        void = await stub.Pull(pull_request(), timeout=SOON_S)
        good = await stub.Pull(pull_request(), timeout=SOON_S)
    kinds = [
        await first_frame(good.data_address, ticket) for ticket in (void.ticket, good.ticket, good.ticket)
    ]
    assert kinds == [FrameKind.REFUSAL, FrameKind.BLOCKS, FrameKind.REFUSAL]


async def first_frame(address: str, ticket: bytes) -> FrameKind:
    with await connect(parse_address(address), timeout_s=SOON_S, idle_timeout_s=SOON_S) as connection:
        await send_payload(connection, FrameKind.TICKET, ticket)
        return (await connection.receive_header()).kind
