"""Pulls by key between real sources and real pullers, and everything that can go wrong."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import numpy as np
import pytest

from kvstore.block_stream import MAX_OUTSTANDING_WANTS, Want, receive_want, seal_chunk
from kvstore.blocks import FORMAT_VERSION
from kvstore.data_plane import Connection
from kvstore.errors import TransferError
from kvstore.frames import FrameKind
from kvstore.tiers.tier import BlockRun, Tier
from kvstore.transfer import receive_ticket, send_payload
from protos import kv_pb2, kv_pb2_grpc
from tests.workers.block_ends import (
    EPOCH,
    FINGERPRINT,
    LAYOUT,
    TIMEOUTS,
    Peer,
    assert_holds,
    chain,
    fill,
    make_fetcher,
    make_store,
    running_peer,
)
from tests.workers.handoff_ends import Impostor, wait_until
from workers.block_exports import BlockExportLimits
from workers.errors import PullCorrupted, PullError, PullInterrupted, PullRefused
from workers.fetch import MAX_KEYS_PER_PULL, BlockFetcher, Chunk, Fetch
from workers.handoff_wire import layout_to_wire
from workers.request import KvHolder

RUN = chain(10)


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    # gRPC ends its own tasks a moment after its objects are closed.
    await wait_until(lambda: asyncio.all_tasks() <= before | {asyncio.current_task()})


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    async with running_peer() as made:
        fill(made.store, RUN)
        yield made


@pytest.fixture
async def fetcher() -> AsyncIterator[BlockFetcher]:
    made = make_fetcher()
    yield made
    await made.close()


def place(chunk: Chunk) -> tuple[Any, list[int]]:
    """The chunk's blocks in slots of a store of our own."""
    store = make_store(num_slots=chunk.num_blocks)
    store.arena_SX[:] = np.frombuffer(chunk.payload, np.uint8).reshape(chunk.num_blocks, -1)
    return store, list(range(chunk.num_blocks))


# All goes well.


async def test_blocks_are_fetched_from_the_last_chunk_to_the_first(peer: Peer, fetcher: BlockFetcher) -> None:
    async with await fetcher.open(peer.holder(), RUN.keys) as fetch:
        assert fetch.num_blocks == 10
        assert fetch.tiers == (Tier.MEMORY,) * 10
        assert fetch.has_same_profile
        await fetch.want(first_block=7, num_blocks=3, level=0)
        await fetch.want(first_block=2, num_blocks=5, level=0)
        for first_block, num_blocks in ((7, 3), (2, 5)):
            chunk = await fetch.receive()
            assert (chunk.first_block, chunk.num_blocks, chunk.level) == (first_block, num_blocks, 0)
            assert_holds(*_args(chunk, first_block))


def _args(chunk: Chunk, first_block: int) -> tuple[Any, Any, Any]:
    store, slots = place(chunk)
    return store, RUN.keys[first_block : first_block + chunk.num_blocks], slots


async def test_a_chunk_says_when_it_began_to_come(peer: Peer, fetcher: BlockFetcher) -> None:
    async with await fetcher.open(peer.holder(), RUN.keys) as fetch:
        await fetch.want(first_block=0, num_blocks=10, level=0)
        asked_s = time.monotonic()
        chunk = await fetch.receive()
        assert asked_s <= chunk.first_byte_s <= time.monotonic()


async def test_only_the_leading_blocks_that_are_held_can_be_had(peer: Peer, fetcher: BlockFetcher) -> None:
    longer = chain(12)
    async with await fetcher.open(peer.holder(), longer.keys) as fetch:
        assert fetch.num_blocks == 10
    async with await fetcher.open(peer.holder(), longer.keys[4:]) as fetch:
        assert fetch.num_blocks == 6


async def test_a_coded_chunk_decodes_to_about_the_same(peer: Peer, fetcher: BlockFetcher) -> None:
    async with await fetcher.open(peer.holder(), RUN.keys) as fetch:
        await fetch.want(first_block=0, num_blocks=10, level=1)
        chunk = await fetch.receive()
        store = make_store(num_slots=10)
        peer.codec.decode(chunk.payload, store.arena_SX, range(10))
        with await peer.store.pin(RUN.keys) as pinned:
            exact = peer.store.arena_SX[list(pinned.slots)].view(np.float32)
        error = np.abs(store.arena_SX.view(np.float32) - exact).mean()
        assert error < 0.2 * np.abs(exact).mean()


# What was coded is kept.


async def coded(peer: Peer, fetcher: BlockFetcher, run: BlockRun, *, num_blocks: int = 10) -> bytes:
    """The first blocks at level 1."""
    async with await fetcher.open(peer.holder(), run.keys) as fetch:
        await fetch.want(first_block=0, num_blocks=num_blocks, level=1)
        return bytes((await fetch.receive()).payload)


async def test_what_was_coded_for_who_names_other_blocks_before_the_last_is_for_nobody_else(
    peer: Peer, fetcher: BlockFetcher
) -> None:
    other = chain(10, first_token=5000, cache_salt="another tenant")
    fill(peer.store, other)
    odd = BlockRun(root=other.root, parent=other.root, first_position=0, keys=(*other.keys[:9], RUN.keys[9]))
    assert await coded(peer, fetcher, odd) != await coded(peer, fetcher, RUN)


async def test_a_chunk_is_encoded_once_for_all_who_want_it(peer: Peer, fetcher: BlockFetcher) -> None:
    first = await coded(peer, fetcher, RUN)
    assert await coded(peer, fetcher, RUN) == first
    assert (peer.num_coded("miss"), peer.num_coded("hit")) == (1, 1)
    await coded(peer, fetcher, RUN, num_blocks=9)
    assert (peer.num_coded("miss"), peer.num_coded("hit")) == (2, 1)


async def test_the_coded_chunks_of_one_tenant_are_not_those_of_another(
    peer: Peer, fetcher: BlockFetcher
) -> None:
    of_another = chain(10, cache_salt="another")
    fill(peer.store, of_another)
    assert await coded(peer, fetcher, RUN) != await coded(peer, fetcher, of_another)
    assert (peer.num_coded("miss"), peer.num_coded("hit")) == (2, 0)


async def test_what_was_dropped_is_not_had_coded_either(peer: Peer, fetcher: BlockFetcher) -> None:
    await coded(peer, fetcher, RUN)
    async with await fetcher.open(peer.holder(), RUN.keys) as fetch:
        async with grpc.aio.insecure_channel(peer.control_address) as channel:
            await kv_pb2_grpc.KvTransferStub(channel).Drop(kv_pb2.DropRequest(source_epoch=EPOCH))
        await fetch.want(first_block=0, num_blocks=10, level=1)
        with pytest.raises(PullRefused, match="block 0 is not held any more"):
            await fetch.receive()
    fill(peer.store, RUN)
    await coded(peer, fetcher, RUN)
    assert (peer.num_coded("miss"), peer.num_coded("hit")) == (2, 0)


async def test_a_puller_that_leaves_early_leaves_nothing_pinned(peer: Peer, fetcher: BlockFetcher) -> None:
    for _ in range(10):
        async with await fetcher.open(peer.holder(), RUN.keys) as fetch:
            for _ in range(MAX_OUTSTANDING_WANTS):
                await fetch.want(first_block=0, num_blocks=10, level=1)
    await wait_until(lambda: peer.listener.num_connections == 0)
    reservation = peer.store.reserve(64)
    assert reservation is not None
    reservation.close()


async def test_a_cancelled_puller_leaves_nothing_pinned(peer: Peer, fetcher: BlockFetcher) -> None:
    began = asyncio.Event()

    async def pull() -> None:
        async with await fetcher.open(peer.holder(), RUN.keys) as fetch:
            began.set()
            while True:
                await fetch.want(first_block=0, num_blocks=10, level=0)
                await fetch.receive()

    task = asyncio.create_task(pull())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await wait_until(lambda: peer.listener.num_connections == 0)


# Both ends do not agree.


async def test_another_epoch_is_refused_and_named(peer: Peer, fetcher: BlockFetcher) -> None:
    with pytest.raises(PullRefused, match=f"epoch 5, this worker is epoch {EPOCH}"):
        await fetcher.open(peer.holder(epoch=5), RUN.keys)


@pytest.mark.parametrize(
    ("settings", "what", "message"),
    [
        ({"fingerprint": b"x" * 32}, "fingerprint", "78787878.*6d6d6d6d"),
        ({"layout": dataclasses.replace(LAYOUT, dtype="bfloat16")}, "layout", "bfloat16.*float32"),
    ],
)
async def test_another_model_is_refused_and_counted(
    peer: Peer, settings: dict[str, Any], what: str, message: str
) -> None:
    fetcher = make_fetcher(**settings)
    with pytest.raises(PullRefused, match=message):
        await fetcher.open(peer.holder(), RUN.keys)
    assert peer.num_mismatches(what) == 1
    await fetcher.close()


async def test_another_profile_leaves_raw_blocks_and_is_counted(peer: Peer) -> None:
    fetcher = make_fetcher(profile_id=b"another profile!")
    async with await fetcher.open(peer.holder(), RUN.keys) as fetch:
        assert not fetch.has_same_profile
        with pytest.raises(ValueError, match="equal profiles"):
            await fetch.want(first_block=0, num_blocks=1, level=1)
        await fetch.want(first_block=0, num_blocks=10, level=0)
        assert_holds(*_args(await fetch.receive(), 0))
    assert peer.num_mismatches("profile") == 1
    await fetcher.close()


async def test_another_block_format_is_refused_and_counted(peer: Peer) -> None:
    async with grpc.aio.insecure_channel(peer.control_address) as channel:
        stub = kv_pb2_grpc.KvTransferStub(channel)
        request = kv_pb2.PullRequest(
            source_epoch=EPOCH, model_fingerprint=FINGERPRINT, layout=layout_to_wire(LAYOUT),
            block_keys=b"".join(RUN.keys), block_format=b"penstock-block-0",
        )  # fmt: skip
        with pytest.raises(grpc.aio.AioRpcError, match=r"penstock-block-0.*penstock-block-1") as error:
            await stub.Pull(request, timeout=5.0)
        assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert peer.num_mismatches("block_format") == 1
        request.block_format = FORMAT_VERSION
        for keys in (b"short", bytes(16 * (MAX_KEYS_PER_PULL + 1))):
            request.block_keys = keys
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Pull(request, timeout=5.0)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_blocks_of_another_tenant_are_not_held(peer: Peer, fetcher: BlockFetcher) -> None:
    with pytest.raises(PullRefused, match="is not held here"):
        await fetcher.open(peer.holder(), chain(10, cache_salt="another tenant").keys)


async def test_a_level_that_does_not_exist_is_refused(peer: Peer, fetcher: BlockFetcher) -> None:
    async with await fetcher.open(peer.holder(), RUN.keys) as fetch:
        await fetch.want(first_block=0, num_blocks=1, level=99)
        with pytest.raises(PullRefused, match="level 99 cannot be had"):
            await fetch.receive()


async def test_blocks_that_are_gone_by_then_are_refused_after_those_that_are_not(
    peer: Peer, fetcher: BlockFetcher
) -> None:
    async with await fetcher.open(peer.holder(), RUN.keys) as fetch:
        await fetch.want(first_block=0, num_blocks=10, level=0)
        await fetch.receive()
        await peer.store.drop(None)
        await fetch.want(first_block=0, num_blocks=10, level=0)
        with pytest.raises(PullRefused, match="block 0 is not held any more"):
            await fetch.receive()


# Tickets.


async def test_a_ticket_is_good_once_and_not_for_long() -> None:
    async with running_peer(limits=BlockExportLimits(ticket_s=0.05, max_tickets=2)) as peer:
        fill(peer.store, RUN)
        for _ in range(2):
            peer.exports.issue_ticket(RUN.keys, codec_profile=b"")
        fetcher = make_fetcher()
        with pytest.raises(PullRefused, match="RESOURCE_EXHAUSTED"):
            await fetcher.open(peer.holder(), RUN.keys)
        await wait_until(lambda: peer.exports.num_tickets == 0)
        async with await fetcher.open(peer.holder(), RUN.keys) as fetch:
            await fetch.want(first_block=0, num_blocks=1, level=0)
            await fetch.receive()
        await fetcher.close()


# Sources that lie, stall or die.

Handler = Callable[[Connection], Any]


async def _answer(connection: Connection, want: Want, payload: bytes) -> None:
    await connection.send_sealed(seal_chunk(want, memoryview(payload)))


async def _wanted(connection: Connection) -> Want:
    await receive_ticket(connection)
    return await receive_want(connection, num_blocks=10, block_bytes=LAYOUT.block_bytes)


async def _wrong_checksum(connection: Connection) -> None:
    want = await _wanted(connection)
    payload = bytearray(want.num_blocks * LAYOUT.block_bytes)
    frame = seal_chunk(want, memoryview(payload))
    payload[0] = 1
    await connection.send_sealed(frame)


async def _other_blocks(connection: Connection) -> None:
    want = await _wanted(connection)
    await _answer(connection, dataclasses.replace(want, first_block=0), bytes(LAYOUT.block_bytes))


async def _keep_alives_forever(connection: Connection) -> None:
    await _wanted(connection)
    with contextlib.suppress(TransferError):
        while True:
            await send_payload(connection, FrameKind.KEEP_ALIVE, b"")


async def _silence(connection: Connection) -> None:
    await _wanted(connection)
    with contextlib.suppress(TransferError):
        await connection.receive_header()  # until the puller gives up


async def _leave(connection: Connection) -> None:
    await _wanted(connection)


@pytest.mark.parametrize(
    ("handler", "error", "message"),
    [
        (_wrong_checksum, PullCorrupted, "checksum"),
        (_other_blocks, PullCorrupted, "asked for was"),
        (_keep_alives_forever, PullCorrupted, "keep-alives"),
        (_silence, PullInterrupted, "did nothing"),
        (_leave, PullInterrupted, "closed"),
    ],
)
async def test_a_source_that_lies_stalls_or_dies_fails_the_pull(
    handler: Handler, error: type[PullError], message: str
) -> None:
    fetcher = make_fetcher(timeouts=dataclasses.replace(TIMEOUTS, idle_s=0.2))
    async with Impostor(handler) as impostor:
        impostor.reply = kv_pb2.PullReply(
            ticket=bytes(16), num_blocks=10, tiers=bytes(10), data_address=impostor.reply.data_address
        )
        holder = KvHolder(
            worker_id="impostor", epoch=1, control_address=impostor.control_address, num_blocks=10
        )
        async with await fetcher.open(holder, RUN.keys) as fetch:
            await fetch.want(first_block=3, num_blocks=2, level=0)
            with pytest.raises(error, match=message):
                await fetch.receive()
    await fetcher.close()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"ticket": b"short"}, "ticket of 5 bytes"),
        ({"num_blocks": 0, "tiers": b""}, "0 blocks"),
        ({"num_blocks": 11, "tiers": bytes(11)}, "11 blocks"),
        ({"tiers": bytes(9)}, "in 9 tiers"),
        ({"tiers": b"\x09" * 10}, "no tier that we know"),
        ({"data_address": "nowhere"}, "not a data address"),
    ],
)
async def test_a_reply_that_cannot_be_is_corrupted(reply: dict[str, Any], message: str) -> None:
    fetcher = make_fetcher()
    async with Impostor(_leave) as impostor:
        facts = {
            "ticket": bytes(16), "num_blocks": 10, "tiers": bytes(10),
            "data_address": impostor.reply.data_address,
        }  # fmt: skip
        impostor.reply = kv_pb2.PullReply(**(facts | reply))
        holder = KvHolder(
            worker_id="impostor", epoch=1, control_address=impostor.control_address, num_blocks=10
        )
        with pytest.raises(PullCorrupted, match=message):
            await fetcher.open(holder, RUN.keys)
    await fetcher.close()


async def test_a_source_that_dribbles_is_cut_off_at_the_end_of_the_pull(fetcher: BlockFetcher) -> None:
    slow = make_fetcher(timeouts=dataclasses.replace(TIMEOUTS, total_s=0.4))
    async with running_peer() as peer:
        fill(peer.store, RUN)
        async with await slow.open(peer.holder(), RUN.keys) as fetch:
            with pytest.raises(PullInterrupted, match="longer than all of it may take"):
                await _receive_forever(fetch)
    await slow.close()


async def _receive_forever(fetch: Fetch) -> None:
    while True:
        await fetch.want(first_block=0, num_blocks=10, level=0)
        await fetch.receive()


async def test_nobody_at_the_address_is_an_interruption(fetcher: BlockFetcher) -> None:
    holder = KvHolder(worker_id="gone", epoch=1, control_address="127.0.0.1:1", num_blocks=1)
    with pytest.raises(PullInterrupted, match="gone answers UNAVAILABLE"):
        await fetcher.open(holder, RUN.keys)
