"""Pulls between a real source and a real puller, and everything that can go wrong."""

import asyncio
import contextlib
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from kvstore.data_plane import Connection
from kvstore.errors import TransferError
from kvstore.frames import FrameKind
from kvstore.layout import KvLayout
from kvstore.listener import Handler
from kvstore.transfer import receive_ticket, send_payload
from protos import kv_pb2
from tests.workers.handoff_ends import (
    EPOCH,
    FINGERPRINT,
    HANDOFF,
    ID,
    NUM_TOKENS,
    PAGES,
    SOON_S,
    SOURCE_PAGES,
    Impostor,
    Source,
    arrived,
    assert_arrived,
    connections_of,
    make_pull,
    make_puller,
    port_of,
    random_pool,
    running_source,
    wait_until,
)
from workers.engine.kv_pool import KvPool
from workers.errors import PullCorrupted, PullError, PullInterrupted, PullRefused
from workers.exports import ExportLimits
from workers.handoff import Puller, PullTimeouts
from workers.handoff_wire import encode_handoff
from workers.reports import ExportProgress
from workers.request import (
    FinishReason,
    Handoff,
    KvSource,
    RequestId,
    TokenLogprobs,
)


@pytest_asyncio.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    # gRPC ends its own tasks a moment after its objects are closed.
    await wait_until(lambda: asyncio.all_tasks() <= before | {asyncio.current_task()})


@pytest_asyncio.fixture
async def source() -> AsyncIterator[Source]:
    async with running_source(ExportLimits(lease_s=10.0, keep_alive_s=0.25)) as made:
        yield made


@pytest.fixture
def pool() -> KvPool:
    return random_pool(2)


@pytest_asyncio.fixture
async def puller(pool: KvPool) -> AsyncIterator[Puller]:
    made = make_puller(pool)
    yield made
    await made.close()
    assert made.num_pending_releases == 0


# All goes well.


async def test_a_computed_prompt_is_pulled_and_released(source: Source, pool: KvPool, puller: Puller) -> None:
    source.open()
    source.finish()
    assert source.exports.num_leases == 1

    handoff = await puller.pull(make_pull(source.control_address))

    assert handoff == HANDOFF
    assert_arrived(source, pool)
    assert await source.next_end() == ("released", ID)
    assert source.exports.num_open == 0


async def test_blocks_cached_at_the_destination_stay_untouched(
    source: Source, pool: KvPool, puller: Puller
) -> None:
    source.open()
    source.finish()
    await puller.pull(make_pull(source.control_address, first_block=4))
    assert_arrived(source, pool, first_block=4)


async def test_blocks_travel_while_the_source_still_computes(
    source: Source, pool: KvPool, puller: Puller
) -> None:
    source.open()
    pulling = asyncio.create_task(puller.pull(make_pull(source.control_address)))

    source.progress(50)  # three full blocks
    await wait_until(lambda: arrived(source, pool, layer=2, block=2))
    assert not arrived(source, pool, layer=0, block=3)
    source.exports.layer_progress(ID, page_ids=SOURCE_PAGES, num_ready_tokens=NUM_TOKENS, num_layers=2)
    await wait_until(lambda: arrived(source, pool, layer=1, block=6))
    assert not arrived(source, pool, layer=2, block=3)
    source.finish()

    assert await pulling == HANDOFF
    assert_arrived(source, pool)


async def test_a_pull_may_come_before_its_request(source: Source, pool: KvPool, puller: Puller) -> None:
    pulling = asyncio.create_task(puller.pull(make_pull(source.control_address)))
    await wait_until(lambda: source.exports.num_waiting_pulls == 1)
    source.open()
    source.finish()
    assert await pulling == HANDOFF
    assert source.exports.num_waiting_pulls == 0


async def test_everything_of_a_request_is_handed_over(source: Source, puller: Puller) -> None:
    everything = Handoff(
        num_computed_tokens=NUM_TOKENS,
        output_token_ids=(7, 8),
        logprobs=(TokenLogprobs(-0.5, ((8, -0.5), (9, -1.25))),),
        finish_reason=FinishReason.STOP,
        stop_string="end",
        num_cached_tokens=32,
    )
    source.open()
    source.finish(everything)
    assert await puller.pull(make_pull(source.control_address)) == everything


async def test_many_pulls_share_the_slots(source: Source, pool: KvPool, puller: Puller) -> None:
    ids = [RequestId(f"request-{number}") for number in range(20)]
    for request_id in ids:
        source.exports.open(request_id, num_prompt_tokens=NUM_TOKENS)
        source.exports.progress(
            ExportProgress(
                request_id=request_id,
                page_ids=SOURCE_PAGES,
                num_computed_tokens=NUM_TOKENS,
                handoff=HANDOFF,
            )
        )
    pulls = [make_pull(source.control_address) for _ in ids]
    for pull, request_id in zip(pulls, ids, strict=True):
        pull.request.kv_source = KvSource(
            worker_id="prefill-0", epoch=EPOCH, control_address=source.control_address, request_id=request_id
        )
    assert await asyncio.gather(*map(puller.pull, pulls)) == [HANDOFF] * len(ids)
    assert {await source.next_end() for _ in ids} == {("released", request_id) for request_id in ids}


# The source says no.


async def test_another_epoch_is_refused_with_both_named(source: Source, puller: Puller) -> None:
    source.open()
    with pytest.raises(PullRefused, match=r"for epoch 76, this worker is epoch 77"):
        await puller.pull(make_pull(source.control_address, epoch=76))


async def test_another_model_is_refused_with_both_named(source: Source, pool: KvPool) -> None:
    source.open()
    stranger = make_puller(pool, fingerprint=b"other")
    with pytest.raises(PullRefused, match=f"model is {b'other'.hex()}, .* serves {FINGERPRINT.hex()}"):
        await stranger.pull(make_pull(source.control_address))
    await stranger.close()


async def test_another_layout_is_refused_with_both_named(source: Source) -> None:
    source.open()
    layout = KvLayout(num_layers=3, num_kv_heads=2, head_dim=4, dtype="float32")
    stranger = make_puller(KvPool(layout, num_pages=12))
    with pytest.raises(PullRefused, match=r"layout is .* float32.*, this worker's .* bfloat16"):
        await stranger.pull(make_pull(source.control_address))
    await stranger.close()


async def test_an_unknown_request_is_refused_after_a_short_wait(pool: KvPool, puller: Puller) -> None:
    async with running_source(ExportLimits(lease_s=10.0, open_wait_s=0.05)) as source:
        with pytest.raises(PullRefused, match="NOT_FOUND"):
            await puller.pull(make_pull(source.control_address))


async def test_a_request_given_up_is_refused_at_once(source: Source, puller: Puller) -> None:
    waiting = asyncio.create_task(puller.pull(make_pull(source.control_address)))
    await wait_until(lambda: source.exports.num_waiting_pulls == 1)
    source.exports.close(ID)  # refused at submit: it was never opened
    with pytest.raises(PullRefused, match="NOT_FOUND"):
        await waiting


async def test_closing_an_export_refuses_its_puller(source: Source, pool: KvPool, puller: Puller) -> None:
    source.open()
    pulling = asyncio.create_task(puller.pull(make_pull(source.control_address)))
    source.progress(50)
    await wait_until(lambda: arrived(source, pool, layer=2, block=2))
    source.exports.close(ID)
    source.exports.close(ID)
    with pytest.raises(PullRefused, match="gave the request up"):
        await pulling
    assert source.ended.empty()


async def test_a_prompt_of_another_length_is_refused(source: Source, puller: Puller) -> None:
    source.exports.open(ID, num_prompt_tokens=20)
    with pytest.raises(PullRefused, match="has 2 blocks, we want 7"):
        await puller.pull(make_pull(source.control_address))


# Sources and pullers that break.


def sends_state(state: bytes) -> Handler:
    """All blocks already cached, so only the state travels."""

    async def handle(connection: Connection) -> None:
        await receive_ticket(connection)
        await send_payload(connection, FrameKind.STATE, state)

    return handle


async def silence(connection: Connection) -> None:
    await receive_ticket(connection)
    with contextlib.suppress(TransferError):
        await connection.receive_header()


async def closes(connection: Connection) -> None:
    await receive_ticket(connection)


async def endless_keep_alives(connection: Connection) -> None:
    await receive_ticket(connection)
    with contextlib.suppress(TransferError):
        while True:
            await send_payload(connection, FrameKind.KEEP_ALIVE, b"")


HASTY = PullTimeouts(handshake_s=5.0, connect_s=0.2, idle_s=0.2, total_s=0.4, release_s=2.0)


@pytest.mark.parametrize(
    ("handler", "error", "found"),
    [
        (closes, PullInterrupted, "closed the connection"),
        (silence, PullInterrupted, "did nothing"),
        (endless_keep_alives, PullCorrupted, "keep-alives"),
        (sends_state(b"\xff\xff"), PullCorrupted, "no HandoffState"),
        (sends_state(encode_handoff(Handoff(num_computed_tokens=5, output_token_ids=(1,)))), PullCorrupted,
         "5 computed tokens fill 1 blocks, 7 came"),
        (sends_state(kv_pb2.HandoffState(num_computed_tokens=100, finish_reason=99).SerializeToString()),  # type: ignore[arg-type]
         PullCorrupted, "unknown finish reason 99"),
    ],
)  # fmt: skip
async def test_a_source_that_misbehaves_is_a_typed_error(
    pool: KvPool, handler: Handler, error: type[PullError], found: str
) -> None:
    puller = make_puller(pool, timeouts=HASTY)
    async with Impostor(handler) as impostor:
        with pytest.raises(error, match=found):
            await puller.pull(make_pull(impostor.control_address, first_block=len(PAGES)))
        async with asyncio.timeout(SOON_S):
            await impostor.released.wait()  # it need not keep the pages
    await puller.close()


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("ticket", b"short", PullCorrupted),
        ("data_address", "http://elsewhere", PullCorrupted),
        ("data_address", "tcp://127.0.0.1:1", PullInterrupted),
        ("num_blocks", 2**32 - 1, PullRefused),
    ],
)
async def test_a_reply_that_cannot_be_is_a_typed_error(
    puller: Puller, field: str, value: object, error: type[PullError]
) -> None:
    async with Impostor(closes) as impostor:
        setattr(impostor.reply, field, value)
        with pytest.raises(error):
            await puller.pull(make_pull(impostor.control_address))


async def test_a_source_that_never_answers_costs_its_deadline(pool: KvPool) -> None:
    puller = make_puller(pool, timeouts=PullTimeouts(handshake_s=0.1, total_s=30.0))
    with pytest.raises(PullInterrupted, match=r"UNAVAILABLE|DEADLINE_EXCEEDED"):
        await puller.pull(make_pull("127.0.0.1:1"))
    await puller.close()


async def test_a_source_that_computes_for_ever_costs_the_total_deadline(source: Source, pool: KvPool) -> None:
    puller = make_puller(pool, timeouts=PullTimeouts(total_s=0.3))
    source.open()
    with pytest.raises(PullInterrupted, match=r"did not hand over request-1 in 0\.3 s"):
        await puller.pull(make_pull(source.control_address))
    await puller.close()


async def test_a_release_is_tried_twice(puller: Puller) -> None:
    async with Impostor(sends_state(encode_handoff(HANDOFF))) as impostor:
        impostor.release_failures = 1
        await puller.pull(make_pull(impostor.control_address, first_block=len(PAGES)))
        async with asyncio.timeout(SOON_S):
            await impostor.released.wait()
        assert impostor.num_releases == 2


@pytest.mark.parametrize("seed", range(4))
async def test_garbage_on_the_data_port_harms_nobody_else(
    source: Source, pool: KvPool, puller: Puller, seed: int
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(source.listener))
    writer.write(random.Random(seed).randbytes(500))
    source.open()
    source.finish()
    assert await puller.pull(make_pull(source.control_address)) == HANDOFF
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""  # hung up on
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    await wait_until(lambda: source.listener.num_connections == 0)


async def test_a_source_that_stops_in_the_middle_interrupts_the_pull(source: Source, puller: Puller) -> None:
    source.open()
    source.progress(50)
    pulling = asyncio.create_task(puller.pull(make_pull(source.control_address)))
    await wait_until(lambda: source.listener.num_connections == 1)
    await source.listener.close()
    with pytest.raises(PullInterrupted):
        await pulling


# A source in a process of its own, that has computed half of a prompt and says where it listens.
SOURCE_PROGRAM = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from tests.workers.handoff_ends import ExportLimits, Source

async def main():
    source = Source(limits=ExportLimits(lease_s=10.0))
    await source.start()
    source.open()
    source.progress(50)
    print(source.control_address, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("number", "found"), [(signal.SIGKILL, "closed|broke"), (signal.SIGSTOP, "did nothing for 1 s")]
)
async def test_a_source_process_killed_or_frozen_in_the_middle_interrupts_the_pull(
    pool: KvPool, number: signal.Signals, found: str
) -> None:
    puller = make_puller(pool, timeouts=PullTimeouts(idle_s=1.0, total_s=30.0))
    root = str(Path(__file__).parents[2])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SOURCE_PROGRAM, root, cwd=root, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        address = (await process.stdout.readline()).decode().strip()
        pulling = asyncio.create_task(puller.pull(make_pull(address)))
        computed = random_pool(1).pages_LP2GBC[2, SOURCE_PAGES[2]]
        await wait_until(lambda: torch.equal(pool.pages_LP2GBC[2, PAGES[2]], computed))
        process.send_signal(number)
        with pytest.raises(PullInterrupted, match=found):
            await pulling
    finally:
        process.kill()
        await process.communicate()
    await puller.close()


async def test_a_puller_that_dies_leaves_a_lease_that_runs_out(pool: KvPool) -> None:
    async with running_source(ExportLimits(lease_s=0.1, keep_alive_s=0.25)) as source:
        puller = make_puller(pool)
        source.open()
        pulling = asyncio.create_task(puller.pull(make_pull(source.control_address)))
        await wait_until(lambda: source.listener.num_connections == 1)
        pulling.cancel()
        await asyncio.wait([pulling])
        await puller.close()
        source.finish()
        assert await source.next_end() == ("expired", ID)
        await wait_until(lambda: source.listener.num_connections == 0)


# Cancelled pulls.


async def cancelled(pulling: "asyncio.Task[Handoff]") -> None:
    pulling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pulling


async def test_a_pull_cancelled_while_it_waits_for_a_slot(source: Source, pool: KvPool) -> None:
    puller = make_puller(pool, num_slots=1)
    source.open()
    first = asyncio.create_task(puller.pull(make_pull(source.control_address)))
    await wait_until(lambda: source.listener.num_connections == 1)
    second = asyncio.create_task(puller.pull(make_pull(source.control_address)))
    await asyncio.sleep(0)
    await cancelled(second)
    source.finish()
    assert await first == HANDOFF
    await puller.close()


async def test_a_pull_cancelled_while_it_waits_for_the_request(source: Source, puller: Puller) -> None:
    pulling = asyncio.create_task(puller.pull(make_pull(source.control_address)))
    await wait_until(lambda: source.exports.num_waiting_pulls == 1)
    await cancelled(pulling)
    await wait_until(lambda: source.exports.num_waiting_pulls == 0)


async def test_a_pull_cancelled_while_it_waits_to_be_accepted(pool: KvPool, puller: Puller) -> None:
    async with running_source(ExportLimits(lease_s=10.0), max_connections=1) as source:
        source.open()
        _, hog_writer = await asyncio.open_connection("127.0.0.1", port_of(source.listener))
        await wait_until(lambda: source.listener.num_connections == 1)
        pulling = asyncio.create_task(puller.pull(make_pull(source.control_address)))
        await wait_until(lambda: len(connections_of(port_of(source.listener))) >= 4)
        await cancelled(pulling)
        hog_writer.close()
        await hog_writer.wait_closed()


@pytest.mark.parametrize("num_tokens", [0, 50, NUM_TOKENS])
async def test_a_pull_cancelled_in_the_middle_writes_no_more(
    source: Source, pool: KvPool, puller: Puller, num_tokens: int
) -> None:
    source.open()
    pulling = asyncio.create_task(puller.pull(make_pull(source.control_address)))
    await wait_until(lambda: source.listener.num_connections == 1)
    source.progress(num_tokens)
    for _ in range(num_tokens // 10):
        await asyncio.sleep(0)
    await cancelled(pulling)
    found = pool.pages_LP2GBC.clone()
    source.finish()
    await wait_until(lambda: source.listener.num_connections == 0)
    assert torch.equal(pool.pages_LP2GBC, found)
    assert source.exports.num_leases == 1


@pytest.mark.parametrize("num_turns", [0, 1, 2, 4, 8, 16, 32, 64, 128])
async def test_a_pull_cancelled_at_any_moment_leaves_nothing(
    source: Source, pool: KvPool, puller: Puller, num_turns: int
) -> None:
    source.open()
    source.finish()
    pulling = asyncio.create_task(puller.pull(make_pull(source.control_address)))
    for _ in range(num_turns):
        await asyncio.sleep(0)
    pulling.cancel()
    await asyncio.wait([pulling])
    found = pool.pages_LP2GBC.clone()
    await wait_until(lambda: source.listener.num_connections == 0)
    assert torch.equal(pool.pages_LP2GBC, found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_kv_that_is_no_number_is_refused(
    source: Source, pool: KvPool, puller: Puller, value: float
) -> None:
    source.pool.pages_LP2GBC[2, SOURCE_PAGES[3], 1, 0, 15, 3] = value
    source.open()
    source.finish()
    with pytest.raises(PullCorrupted, match="of layer 2 hold NaN or infinity"):
        await puller.pull(make_pull(source.control_address))
    assert await source.next_end() == ("released", ID)
    assert pool.pages_LP2GBC.isfinite().all()
