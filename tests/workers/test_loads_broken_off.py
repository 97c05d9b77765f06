"""Loads that break off, and chunks that are decoded while others travel: nothing is left, nothing overwritten."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstore.codec.codec import KvCodec
from kvstore.disk_reader import DiskReader
from kvstore.streaming import plan_stream
from tests.workers.loading_ends import (
    CHUNK_BLOCKS,
    HOLDER,
    NUM_BLOCKS,
    NUM_CHUNKS,
    PROMPT,
    SOON_S,
    End,
    running_end,
)
from workers import load_plan, load_sources
from workers.engine.kv_pool import KvPool
from workers.request import FinishReason

# Whoever goes leaves nothing behind.


class Blocked:
    """A thread's work that waits before it begins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        work = getattr(owner, name)

        def waits(*arguments: Any, **keywords: Any) -> Any:
            self.reached.set()
            assert self.go.wait(SOON_S)
            return work(*arguments, **keywords)

        monkeypatch.setattr(owner, name, waits)

    async def is_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, SOON_S)


@pytest.mark.parametrize("stage", ["opening", "sending"])
@pytest.mark.parametrize("leaves", ["abort", "close_session"])
async def test_an_abort_while_a_peer_is_waited_for_leaves_nothing(
    end: End, fetching: list[int], stage: str, leaves: str
) -> None:
    gate = getattr(end.peer, stage)
    gate.shut()
    request_id = end.submit(PROMPT, kv_holders=(HOLDER,))
    await asyncio.wait_for(gate.reached.wait(), SOON_S)
    if leaves == "abort":
        end.loop.abort(end.session_id, request_id)
    else:
        end.loop.close_session(end.session_id)
    await end.settled()


async def test_an_abort_while_blocks_are_copied_keeps_their_pages_until_the_copy_has_ended(
    end: End, truth: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Blocked(monkeypatch, KvPool, "load")
    request_id = end.submit(PROMPT)
    await copy.is_reached()
    end.loop.abort(end.session_id, request_id)
    assert (await end.ended(request_id)).finish_reason is FinishReason.ABORT
    assert end.state.num_pinned_pages == NUM_BLOCKS
    before, _ = await end.answer([9] * 500)  # in pages of its own
    copy.go.set()
    await end.settled()
    end.state.drop(None)
    await end.store.drop(None)
    assert (await end.answer([9] * 500))[0] == before


async def test_an_abort_while_blocks_are_read_from_disk_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_end(checkpoint, disk=tmp_path) as first:
        await first.answer(PROMPT)
        await first.settled()
    reached = asyncio.Event()
    wait = DiskReader.wait

    async def tells(self: DiskReader, reads: Any) -> None:
        reached.set()
        await wait(self, reads)

    monkeypatch.setattr(DiskReader, "wait", tells)
    async with running_end(checkpoint, disk=tmp_path) as second:
        request_id = second.submit(PROMPT)
        await asyncio.wait_for(reached.wait(), SOON_S)
        second.loop.abort(second.session_id, request_id)
        await second.settled()


async def test_an_abort_while_a_chunk_is_decoded_leaves_nothing(
    end: End, fetching: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go = threading.Event(), threading.Event()
    copy = load_sources.copy_raw

    def waits(*arguments: Any) -> None:
        reached.set()
        assert go.wait(SOON_S)
        copy(*arguments)

    monkeypatch.setattr(load_sources, "copy_raw", waits)
    request_id = end.submit(PROMPT, kv_holders=(HOLDER,))
    assert await asyncio.to_thread(reached.wait, SOON_S)
    end.loop.abort(end.session_id, request_id)
    await end.ended(request_id)
    go.set()
    await end.settled()


@pytest.fixture
async def lossy(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[End]:
    """Only the peer has the blocks, and all are fetched at level 1."""
    monkeypatch.setattr(load_plan, "plan_stream", lambda *view: replace(plan_stream(*view), level=1))
    async with running_end(checkpoint, max_level=1) as end:
        await end.answer(PROMPT)
        await end.settled()
        end.give_to(end.peer)
        end.state.drop(None)
        await end.store.drop(None)
        yield end


async def test_the_next_chunks_travel_while_one_is_decoded(
    lossy: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Blocked(monkeypatch, KvCodec, "decode")
    request_id = lossy.submit(PROMPT, kv_holders=(HOLDER,))
    async with asyncio.timeout(SOON_S):
        while len(lossy.peer.sent) < NUM_CHUNKS:  # noqa: ASYNC110
            await asyncio.sleep(0)
    decode.go.set()
    assert (await lossy.ended(request_id)).num_cached_tokens == NUM_BLOCKS * 16
    await lossy.settled()


async def test_what_is_coded_is_decoded_right_into_the_pages_of_a_request_that_has_some(
    lossy: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copies(*arguments: Any) -> None:
        raise AssertionError("a copy from slots")

    monkeypatch.setattr(KvPool, "load", copies)
    _, last = await lossy.answer(PROMPT, kv_holders=(HOLDER,))
    assert last.num_cached_tokens == NUM_BLOCKS * 16
    assert lossy.num_loaded == {"peer": NUM_BLOCKS}
    await lossy.settled()


async def test_what_is_coded_gives_the_same_answer_through_slots(lossy: End) -> None:
    expected, _ = await lossy.answer(PROMPT, kv_holders=(HOLDER,))
    await lossy.settled()
    lossy.state.drop(None)
    blockers = [lossy.submit([9 - i] * 500, arrival_s=-1.0, max_tokens=12) for i in range(2)]  # all pages
    tokens, last = await lossy.answer(PROMPT, kv_holders=(HOLDER,))
    assert (tokens, last.num_cached_tokens) == (expected, NUM_BLOCKS * 16)
    for blocker in blockers:
        await lossy.ended(blocker)
    await lossy.settled()


async def test_an_abort_keeps_the_pages_that_are_decoded_into(
    lossy: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Blocked(monkeypatch, KvCodec, "decode")
    request_id = lossy.submit(PROMPT, kv_holders=(HOLDER,))
    await decode.is_reached()
    lossy.loop.abort(lossy.session_id, request_id)
    assert (await lossy.ended(request_id)).finish_reason is FinishReason.ABORT
    assert lossy.state.num_pinned_pages >= CHUNK_BLOCKS
    decode.go.set()
    await lossy.settled()


async def test_the_engine_computes_what_is_late_only_when_nothing_writes_to_its_pages_any_more(
    lossy: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Blocked(monkeypatch, KvCodec, "decode")
    lossy.costs.s_per_token = 1e-4
    request_id = lossy.submit(PROMPT, kv_holders=(HOLDER,))
    async with asyncio.timeout(SOON_S):
        while not lossy.sample("penstock_kv_load_failures_total", reason="late"):  # noqa: ASYNC110
            await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    assert [r.request_id for r in lossy.state.loads.stalled()] == [request_id]
    decode.go.set()
    assert (await lossy.ended(request_id)).num_cached_tokens == 0
    await lossy.settled()


async def test_an_abort_while_two_chunks_are_decoded_and_one_is_waited_for_leaves_nothing(
    lossy: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Blocked(monkeypatch, KvCodec, "decode")
    request_id = lossy.submit(PROMPT, kv_holders=(HOLDER,))
    async with asyncio.timeout(SOON_S):
        while len(lossy.peer.sent) < NUM_CHUNKS - 1:  # noqa: ASYNC110
            await asyncio.sleep(0)
    await decode.is_reached()
    lossy.peer.sending.shut()
    lossy.loop.abort(lossy.session_id, request_id)
    await lossy.ended(request_id)
    decode.go.set()
    await lossy.settled()


async def test_a_step_that_fails_while_blocks_come_leaves_nothing(
    end: End, fetching: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*arguments: Any, **keywords: Any) -> Any:
        raise RuntimeError("out of luck")

    end.costs.s_per_token = 1e-4
    end.peer.sending.shut()
    monkeypatch.setattr(end.engine, "execute", breaks)
    last = await end.ended(end.submit(PROMPT, kv_holders=(HOLDER,)))
    assert last.finish_reason is FinishReason.ERROR
    await end.settled()


async def test_a_worker_that_stops_while_blocks_come_leaves_nothing(checkpoint: Path) -> None:
    async with AsyncExitStack() as stack:
        end = await stack.enter_async_context(running_end(checkpoint))
        await end.answer(PROMPT)
        await end.settled()
        end.give_to(end.peer)
        end.state.drop(None)
        await end.store.drop(None)
        end.peer.sending.shut()
        end.submit(PROMPT, kv_holders=(HOLDER,))
        await asyncio.wait_for(end.peer.sending.reached.wait(), SOON_S)
    assert end.memory.num_idle == end.memory.num_slots
    assert end.peer.num_open == end.state.num_pinned_pages == 0
