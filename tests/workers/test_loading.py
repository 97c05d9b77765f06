"""What is loaded is what would have been computed, wherever it comes from and however far it comes."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
from workers import load_plan
from workers.compute_device import ComputeDevice
from workers.request import FinishReason, Purpose


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


@pytest.mark.parametrize("level", [0, 1])
async def test_a_device_saves_loads_and_decodes_into_its_pages_as_a_cpu_does(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    monkeypatch.setattr(load_plan, "plan_stream", lambda *view: replace(plan_stream(*view), level=level))
    reference, answers = ComputeDevice(attention="reference"), []
    for compute in (ComputeDevice(), reference):
        async with running_end(checkpoint, max_level=1, compute=compute) as end:
            computed, _ = await end.answer(PROMPT)
            await end.settled()
            end.give_to(end.peer)
            end.state.drop(None)
            from_memory, last = await end.answer(PROMPT)
            assert (from_memory, last.num_cached_tokens) == (computed, NUM_BLOCKS * 16)
            await end.settled()
            end.state.drop(None)
            await end.store.drop(None)
            from_peer, last = await end.answer(PROMPT, kv_holders=(HOLDER,))
            assert last.num_cached_tokens == NUM_BLOCKS * 16
            assert {sent for _, sent in end.peer.sent} == {level}
            await end.settled()
            answers.append((computed, from_peer))
    assert answers[0] == answers[1]


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
