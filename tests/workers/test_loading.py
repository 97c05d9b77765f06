"""What is loaded is what would have been computed, wherever it comes from and however far it comes."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.codec.codec import KvCodec
from kvstore.disk_reader import DiskReader
from kvstore.streaming import plan_stream
from tests.workers.loading_ends import CHUNK_BLOCKS, HOLDER, SOON_S, End, running_end
from workers import load_plan, load_sources
from workers.engine.kv_pool import KvPool
from workers.request import FinishReason, Purpose

# 200 tokens: twelve full blocks in three chunks, and some tokens more, which are always computed.
PROMPT = [(7 * i) % 250 + 3 for i in range(200)]
NUM_BLOCKS, NUM_CHUNKS = 12, 3


@pytest.fixture
async def end(checkpoint: Path) -> AsyncIterator[End]:
    async with running_end(checkpoint) as one:
        yield one


@pytest.fixture
async def truth(end: End) -> list[int]:
    """The answer to PROMPT, computed; its blocks are in memory, and with the peer, and in no page."""
    tokens, _ = await end.answer(PROMPT)
    await end.settled()
    end.give_to(end.peer)
    end.state.drop(None)
    return tokens


@pytest.fixture
async def fetching(end: End, truth: list[int]) -> list[int]:
    """The same, but only the peer has the blocks."""
    await end.store.drop(None)
    return truth


def events(output: Any) -> list[str]:
    return [stamp.name for stamp in output.timeline]


async def test_what_memory_holds_is_not_computed_again(end: End, truth: list[int]) -> None:
    tokens, last = await end.answer(PROMPT)
    assert tokens == truth
    assert last.num_cached_tokens == NUM_BLOCKS * 16
    assert end.num_loaded == {"memory": NUM_BLOCKS}
    names = events(last)
    assert names.index("load_started") < names.index("load_done") < names.index("first_token")
    await end.settled()


async def test_generated_blocks_are_loaded_as_well(end: End, truth: list[int]) -> None:
    tokens, _ = await end.answer(PROMPT, max_tokens=40)
    await end.settled()
    end.state.drop(None)
    more, last = await end.answer([*PROMPT, *tokens], max_tokens=4)
    assert last.num_cached_tokens == (240 - 1) // 16 * 16
    end.state.drop(None)
    await end.store.drop(None)
    assert more == (await end.answer([*PROMPT, *tokens], max_tokens=4))[0]


async def test_blocks_in_pages_are_used_and_the_rest_is_loaded(end: End, truth: list[int]) -> None:
    await end.answer(PROMPT[:50])  # three blocks
    tokens, last = await end.answer(PROMPT)
    assert (tokens, last.num_cached_tokens) == (truth, NUM_BLOCKS * 16)
    await end.settled()


async def test_a_restarted_worker_loads_from_its_disk(checkpoint: Path, tmp_path: Path) -> None:
    async with running_end(checkpoint, disk=tmp_path) as first:
        expected, _ = await first.answer(PROMPT)
        await first.settled()
    async with running_end(checkpoint, disk=tmp_path) as second:
        tokens, last = await second.answer(PROMPT)
        assert (tokens, last.num_cached_tokens) == (expected, NUM_BLOCKS * 16)
        assert second.num_loaded == {"disk": NUM_BLOCKS}
        await second.settled()


async def test_what_a_peer_sends_raw_is_held_here_from_then_on(end: End, fetching: list[int]) -> None:
    tokens, last = await end.answer(PROMPT, kv_holders=(HOLDER,))
    assert (tokens, last.num_cached_tokens) == (fetching, NUM_BLOCKS * 16)
    assert end.num_loaded == {"peer": NUM_BLOCKS}
    await end.settled()
    end.state.drop(None)
    again, last = await end.answer(PROMPT)
    assert (again, last.num_cached_tokens) == (fetching, NUM_BLOCKS * 16)
    await end.settled()


async def test_a_prefill_for_another_worker_is_loaded_too(end: End, fetching: list[int]) -> None:
    request_id = end.submit(PROMPT, kv_holders=(HOLDER,), purpose=Purpose.PREFILL_ONLY)
    async with asyncio.timeout(SOON_S):
        while not end.ear.outputs.get(request_id):
            end.ear.changed.clear()
            await end.ear.changed.wait()
    [output] = end.ear.outputs[request_id]
    assert output.token_ids == tuple(fetching[:1])
    assert output.num_cached_tokens == NUM_BLOCKS * 16
    end.loop.lease_ended(request_id, released=True)
    assert (await end.ended(request_id)).finish_reason is FinishReason.HANDED_OVER
    await end.settled()


async def test_blocks_that_came_lossy_stay_in_pages(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_plan, "plan_stream", lambda *view: replace(plan_stream(*view), level=1))
    async with running_end(checkpoint, max_level=1) as end:
        await end.answer(PROMPT)
        await end.settled()
        end.give_to(end.peer)
        end.state.drop(None)
        await end.store.drop(None)
        end.offered.clear()
        end.state.take_block_events()
        _, last = await end.answer(PROMPT, kv_holders=(HOLDER,), max_tokens=40)
        assert {level for _, level in end.peer.sent} == {1}
        assert last.num_cached_tokens == NUM_BLOCKS * 16
        await end.settled()
        assert end.offered == []
        assert end.memory.longest_prefix(list(end.peer.blocks)) == 0
        assert end.state.take_block_snapshot() == ()
        _, shared = await end.answer(PROMPT)  # the same worker goes on from them
        assert shared.num_cached_tokens == NUM_BLOCKS * 16


@pytest.mark.parametrize("num_chunks", range(NUM_CHUNKS + 1))
async def test_a_peer_that_goes_leaves_the_front_to_the_engine(
    end: End, fetching: list[int], num_chunks: int
) -> None:
    end.peer.fails_after = num_chunks
    tokens, last = await end.answer(PROMPT, kv_holders=(HOLDER,))
    assert tokens == fetching
    assert last.num_cached_tokens == num_chunks * CHUNK_BLOCKS * 16
    assert ("load_failed" in events(last)) == (num_chunks < NUM_CHUNKS)
    await end.settled()


@pytest.mark.parametrize("what", ["refuses", "garbles"])
async def test_a_peer_that_does_not_agree_or_lies_costs_nothing_but_time(
    end: End, fetching: list[int], what: str
) -> None:
    setattr(end.peer, what, True)
    tokens, last = await end.answer(PROMPT, kv_holders=(HOLDER,))
    assert (tokens, last.num_cached_tokens) == (fetching, 0)
    await end.settled()


async def test_a_peer_that_has_less_than_was_said_sends_that(end: End, fetching: list[int]) -> None:
    for key in list(end.peer.blocks)[5:]:
        del end.peer.blocks[key]
    tokens, last = await end.answer(PROMPT, kv_holders=(HOLDER,))
    assert (tokens, last.num_cached_tokens) == (fetching, 5 * 16)
    await end.settled()


async def test_the_next_holder_is_asked_where_one_refuses(end: End, fetching: list[int]) -> None:
    blocks, end.peer.blocks = end.peer.blocks, {}

    async def give_blocks() -> None:
        await end.peer.opening.reached.wait()
        end.peer.blocks = blocks

    async with asyncio.TaskGroup() as group:
        group.create_task(give_blocks())
        tokens, _ = await end.answer(PROMPT, kv_holders=(HOLDER, HOLDER))
    assert tokens == fetching
    await end.settled()


@pytest.mark.parametrize("num_chunks", range(NUM_CHUNKS))
async def test_the_next_holder_goes_on_where_one_breaks_off(
    end: End, fetching: list[int], num_chunks: int
) -> None:
    end.peer.fails_after, end.peer.next_blocks = num_chunks, end.peer.blocks
    tokens, last = await end.answer(PROMPT, kv_holders=(HOLDER, HOLDER))
    assert (tokens, last.num_cached_tokens) == (fetching, NUM_BLOCKS * 16)
    assert len(end.peer.sent) == NUM_CHUNKS  # none twice
    assert end.sample("penstock_kv_load_failures_total", reason="PullInterrupted") == 1
    await end.settled()


async def test_the_next_holder_goes_on_where_one_lies(end: End, fetching: list[int]) -> None:
    end.peer.garbles, end.peer.next_blocks = True, end.peer.blocks
    tokens, last = await end.answer(PROMPT, kv_holders=(HOLDER, HOLDER))
    assert (tokens, last.num_cached_tokens) == (fetching, NUM_BLOCKS * 16)
    await end.settled()


async def test_a_next_holder_that_would_leave_a_gap_is_passed_over(end: End, fetching: list[int]) -> None:
    end.peer.fails_after, end.peer.next_blocks = 1, dict(list(end.peer.blocks.items())[:5])
    tokens, last = await end.answer(PROMPT, kv_holders=(HOLDER, HOLDER))
    assert (tokens, last.num_cached_tokens) == (fetching, CHUNK_BLOCKS * 16)
    assert "load_failed" in events(last)
    await end.settled()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
async def test_raw_kv_that_is_no_number_is_refused(end: End, fetching: list[int], number: float) -> None:
    key = list(end.peer.blocks)[5]
    values = np.frombuffer(end.peer.blocks[key], np.float32).copy()
    values[-1] = number
    end.peer.blocks[key] = values.tobytes()
    tokens, last = await end.answer(PROMPT, kv_holders=(HOLDER,))
    assert (tokens, last.num_cached_tokens) == (fetching, CHUNK_BLOCKS * 16)  # the chunk after it
    assert end.sample("penstock_kv_load_failures_total", reason="PullCorrupted") == 1
    await end.settled()


@pytest.mark.parametrize("stage", ["opening", "sending"])
async def test_a_peer_that_falls_silent_is_waited_for_no_longer_than_computing_takes(
    end: End, fetching: list[int], stage: str
) -> None:
    end.costs.s_per_token = 1e-4
    getattr(end.peer, stage).shut()
    tokens, _ = await end.answer(PROMPT, kv_holders=(HOLDER,))
    assert tokens == fetching
    assert end.sample("penstock_kv_load_failures_total", reason="late") == 1
    await end.settled()


async def test_where_computing_is_faster_nothing_is_fetched(end: End, fetching: list[int]) -> None:
    end.costs.s_per_token = 1e-9
    tokens, last = await end.answer(PROMPT, kv_holders=(HOLDER,))
    assert (tokens, last.num_cached_tokens) == (fetching, 0)
    assert end.sample("penstock_kv_decisions_total", choice="recompute") == 1
    assert end.peer.sent == []
    await end.settled()


async def test_a_load_begins_while_the_request_waits_for_pages(end: End, fetching: list[int]) -> None:
    blocker = end.submit([9] * 500, arrival_s=-1.0, max_tokens=12)
    rest = end.submit([8] * 500, arrival_s=-1.0, max_tokens=12)
    request_id = end.submit(PROMPT, kv_holders=(HOLDER,))
    await asyncio.wait_for(end.peer.sending.reached.wait(), SOON_S)
    last = await end.ended(request_id)
    await end.ended(blocker)
    await end.ended(rest)
    assert last.num_cached_tokens == NUM_BLOCKS * 16
    await end.settled()


async def test_many_loads_take_turns(checkpoint: Path) -> None:
    async with running_end(checkpoint, limits={"max_num_loads": 2}, num_pages=128) as end:
        prompts = [[number + 3] * 100 for number in range(8)]
        expected = [(await end.answer(prompt))[0] for prompt in prompts]
        await end.settled()
        end.state.drop(None)
        request_ids = [end.submit(prompt) for prompt in prompts]
        for request_id, tokens in zip(request_ids, expected, strict=True):
            await end.ended(request_id)
            said = end.ear.outputs[request_id]
            assert [token for output in said for token in output.token_ids] == tokens
        assert 2 * 6 <= end.num_loaded["memory"] <= 8 * 6
        await end.settled()


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


async def test_a_preempted_request_is_loaded_and_not_recomputed(checkpoint: Path) -> None:
    async with running_end(checkpoint, num_pages=16) as alone:
        expected = [(await alone.answer([number + 3] * 60, max_tokens=120))[0] for number in range(2)]
    async with running_end(checkpoint, num_pages=16) as end:
        request_ids = [
            end.submit([number + 3] * 60, max_tokens=120, arrival_s=float(number)) for number in range(2)
        ]
        lasts = [await end.ended(request_id) for request_id in request_ids]
        for request_id, tokens in zip(request_ids, expected, strict=True):
            said = end.ear.outputs[request_id]
            assert [token for output in said for token in output.token_ids] == tokens
        assert "preempted" in events(lasts[1])
        assert end.num_loaded["memory"] > 0
        await end.settled()
