"""Blocks leave device pages beside the steps, never at their cost."""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.blocks import chain_keys, root_key
from tests.workers.loading_ends import PROMPT, SOON_S, End, running_end
from workers.engine.kv_pool import KvPool


@pytest.fixture
def slow_copy(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set, it lets the copies go on."""
    go, save = threading.Event(), KvPool.save

    def waits(self: KvPool, *arguments: Any) -> None:
        assert go.wait(SOON_S)
        save(self, *arguments)

    monkeypatch.setattr(KvPool, "save", waits)
    return go


async def test_prompt_and_generated_blocks_are_written_in_the_order_of_their_chain(end: End) -> None:
    tokens, _ = await end.answer(PROMPT, max_tokens=40)
    await end.settled()
    root = root_key(model_fingerprint=end.engine.model.fingerprint)
    keys = list(chain_keys(root, [*PROMPT, *tokens[:-1]]))
    assert [key for run in end.offered for key in run.keys] == keys
    parent, position = root, 0
    for run in end.offered:
        assert (run.root, run.parent, run.first_position) == (root, parent, position)
        parent, position = run.keys[-1], position + len(run.keys)
    assert end.memory.longest_prefix(keys) == len(keys)


async def test_generated_blocks_are_written_together_and_at_the_latest_when_the_engine_rests(
    checkpoint: Path,
) -> None:
    async with running_end(checkpoint, num_pages=256, linger_s=SOON_S) as end:
        await end.answer(PROMPT, max_tokens=1)
        await end.settled()
        end.offered.clear()
        await end.answer(PROMPT, max_tokens=16 * 12)
        await end.settled()
        assert [len(run.keys) for run in end.offered] == [8, 4]


async def test_generated_blocks_wait_a_bounded_time_for_more_of_their_chain(checkpoint: Path) -> None:
    async with running_end(checkpoint, num_pages=256, linger_s=0.0) as end:
        await end.answer(PROMPT, max_tokens=16 * 12)
        assert len(end.offered) > 3
        await end.settled()


async def test_copies_pause_while_the_engine_works_and_go_on_at_once_when_it_rests(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, save = asyncio.Event(), KvPool.save
    num_copied: list[int] = []

    def counts(self: KvPool, page_ids: Sequence[int], *arguments: Any) -> None:
        save(self, page_ids, *arguments)
        num_copied.append(len(page_ids))
        loop.call_soon_threadsafe(copied.set)

    monkeypatch.setattr(KvPool, "save", counts)
    loop = asyncio.get_running_loop()
    # A piece is a block, and its pause longer than the test.
    async with running_end(checkpoint, max_piece_bytes=1, max_core_share=1e-9, max_pause_s=SOON_S) as end:
        busy = end.submit([9] * 20, max_tokens=400)
        await end.answer(PROMPT, max_tokens=40)
        async with asyncio.timeout(SOON_S):
            await copied.wait()
        assert num_copied == [1]
        end.loop.abort(end.session_id, busy)
        await end.settled()
        assert set(num_copied) == {1}
        assert sum(num_copied) == sum(len(run.keys) for run in end.offered) >= 14


async def test_what_the_tiers_hold_is_not_written_again(end: End) -> None:
    await end.answer(PROMPT)
    await end.settled()
    end.state.drop(None)
    end.costs.s_per_token = 0.0
    end.offered.clear()
    await end.answer(PROMPT)
    await end.settled()
    assert end.offered == []


async def test_only_a_share_of_the_pages_is_pinned_and_the_rest_is_let_go(
    checkpoint: Path, slow_copy: threading.Event
) -> None:
    async with running_end(checkpoint, max_pinned_share=0.125) as end:  # eight of 64 pages
        await end.answer(PROMPT)
        assert end.state.num_pinned_pages == end.write_behind.num_pinned <= 8
        slow_copy.set()
        await end.settled()
        assert sum(len(run.keys) for run in end.offered) == 8
        behind = end.sample("penstock_kv_write_behind_blocks_total", outcome="behind")
        assert behind == 4


async def test_a_request_that_needs_all_pages_runs_once_the_copies_have_ended(
    checkpoint: Path, slow_copy: threading.Event
) -> None:
    async with running_end(checkpoint, num_pages=16) as end:
        await end.answer(PROMPT)
        request_id = end.submit([9] * 230, max_tokens=20)
        for _ in range(100):
            await asyncio.sleep(0)
        assert request_id not in end.ear.outputs
        slow_copy.set()
        await end.ended(request_id)
        await end.settled()


async def test_what_is_dropped_while_it_waits_for_more_of_its_chain_is_not_written(checkpoint: Path) -> None:
    async with running_end(checkpoint, linger_s=SOON_S) as end:
        busy = end.submit([9] * 20, max_tokens=400)
        await end.answer(PROMPT, max_tokens=40, cache_salt="A")
        assert end.write_behind.num_pinned > 0
        root = root_key(model_fingerprint=end.engine.model.fingerprint, cache_salt="A")
        await end.write_behind.drop(root)
        end.state.drop(root)
        await end.store.drop(root)
        end.loop.abort(end.session_id, busy)
        await end.settled()
        keys = list(chain_keys(root, PROMPT))
        assert end.state.num_cached_blocks(keys) == end.memory.longest_prefix(keys) == 0


async def test_a_drop_waits_for_what_is_being_copied(end: End, slow_copy: threading.Event) -> None:
    await end.answer(PROMPT)
    dropping = asyncio.create_task(end.write_behind.drop(None))
    await asyncio.sleep(0)
    assert not dropping.done()
    slow_copy.set()
    await dropping
    assert end.state.num_pinned_pages == 0
    assert await end.store.drop(None) == sum(len(run.keys) for run in end.offered)
    await end.settled()
    assert len(end.store.lookup(end.offered[0].keys)) == 0


async def test_memory_without_room_loses_what_does_not_fit(checkpoint: Path) -> None:
    async with running_end(checkpoint, num_slots=8) as end:
        held = end.store.reserve(8)
        assert held is not None
        tokens, _ = await end.answer(PROMPT)
        async with asyncio.timeout(SOON_S):
            while end.write_behind.num_pinned:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert end.offered == []
        assert end.sample("penstock_kv_write_behind_blocks_total", outcome="no_room") == 12
        held.close()
        end.state.drop(None)
        assert (await end.answer(PROMPT))[0] == tokens
        await end.settled()


async def test_a_copy_that_raises_frees_its_pages_and_the_next_ones_are_written(
    end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = KvPool.save

    def breaks_once(self: KvPool, *arguments: Any) -> None:
        monkeypatch.setattr(KvPool, "save", save)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(KvPool, "save", breaks_once)
    await end.answer(PROMPT)
    await end.settled()
    assert sum(len(run.keys) for run in end.offered) < 12
    await end.answer([5] * 100)
    await end.settled()
    assert end.offered[-1].first_position + len(end.offered[-1].keys) == 6


async def test_a_worker_that_stops_while_blocks_are_copied_leaves_nothing(
    checkpoint: Path, slow_copy: threading.Event
) -> None:
    async with running_end(checkpoint) as end:
        await end.answer(PROMPT)
        assert end.write_behind.num_pinned > 0
        slow_copy.set()
    assert end.state.num_pinned_pages == 0
    assert end.memory.num_idle == end.memory.num_slots
