"""Pullers that take nothing, or take it for ever: what they cost a source is bounded, and others are told."""

import asyncio
import contextlib

import pytest

from kvstore.block_stream import MAX_OUTSTANDING_WANTS
from kvstore.errors import TransferRefused
from tests.workers.block_ends import LAYOUT, chain, fill, make_fetcher, running_peer
from tests.workers.handoff_ends import wait_until
from workers.block_exports import BlockExportLimits
from workers.errors import PullInterrupted, PullRefused
from workers.fetch import Fetch
from workers.sending_room import SendingRoom

# 8 MiB: more than sockets hold for who does not read.
NUM_BLOCKS = 1024
RUN = chain(NUM_BLOCKS)
CHUNK_BYTES = NUM_BLOCKS * LAYOUT.block_bytes


async def test_pullers_that_take_nothing_keep_no_more_memory_than_is_allowed_and_others_are_told() -> None:
    limits = BlockExportLimits(sending_bytes=2 * CHUNK_BYTES, room_s=0.02)
    async with running_peer(limits=limits, num_slots=NUM_BLOCKS) as peer:
        fill(peer.store, RUN)
        fetcher = make_fetcher()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                fetch = await stack.enter_async_context(await fetcher.open(peer.holder(), RUN.keys))
                for _ in range(MAX_OUTSTANDING_WANTS):
                    await fetch.want(first_block=0, num_blocks=NUM_BLOCKS, level=0)
            async with await fetcher.open(peer.holder(), RUN.keys) as late:
                await late.want(first_block=0, num_blocks=NUM_BLOCKS, level=0)
                with pytest.raises(
                    PullRefused, match=f"on their way to other pullers, at most {2 * CHUNK_BYTES}"
                ):
                    await late.receive()
        await wait_until(lambda: peer.listener.num_connections == 0)
        async with await fetcher.open(peer.holder(), RUN.keys) as fetch:
            await fetch.want(first_block=0, num_blocks=NUM_BLOCKS, level=0)
            assert len((await fetch.receive()).payload) == CHUNK_BYTES
        await fetcher.close()


async def receive_forever(fetch: Fetch) -> None:
    while True:
        await fetch.want(first_block=0, num_blocks=10, level=0)
        await fetch.receive()


async def test_a_puller_that_never_ends_is_ended() -> None:
    async with running_peer(limits=BlockExportLimits(total_s=0.1)) as peer:
        fill(peer.store, chain(10))
        fetcher = make_fetcher()
        async with await fetcher.open(peer.holder(), chain(10).keys) as fetch:
            with pytest.raises(PullInterrupted):
                await receive_forever(fetch)
        async with await fetcher.open(peer.holder(), chain(10).keys):
            await wait_until(lambda: peer.listener.num_connections == 0)
        await fetcher.close()


async def test_the_blocks_of_tickets_that_nobody_uses_are_bounded() -> None:
    async with running_peer(limits=BlockExportLimits(max_ticket_blocks=15)) as peer:
        fill(peer.store, chain(10))
        peer.exports.issue_ticket(chain(10).keys, codec_profile=b"")
        fetcher = make_fetcher()
        with pytest.raises(PullRefused, match="10 blocks have tickets not used yet, 10 more are too many"):
            await fetcher.open(peer.holder(), chain(10).keys)
        async with await fetcher.open(peer.holder(), chain(10).keys[5:]) as fetch:
            assert fetch.num_blocks == 5
        await fetcher.close()


async def test_room_is_waited_for_and_had_once_another_gives_its_own() -> None:
    room = SendingRoom(capacity_bytes=100, wait_s=10.0)
    await room.take(60)
    waiting = asyncio.create_task(room.take(60))
    room.give(10)
    await asyncio.sleep(0)
    assert not waiting.done()
    room.give(50)
    await waiting
    assert room.num_bytes == 60


async def test_room_that_nobody_gives_is_refused_and_what_is_alone_has_room() -> None:
    room = SendingRoom(capacity_bytes=100, wait_s=0.01)
    await room.take(200)
    with pytest.raises(TransferRefused, match="200 bytes are on their way to other pullers, at most 100"):
        await room.take(1)
    room.give(200)
    await room.take(100)
    assert room.num_bytes == 100
