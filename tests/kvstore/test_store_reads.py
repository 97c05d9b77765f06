"""Blocks that come from disk to memory when somebody wants them."""

import asyncio

import pytest

from kvstore.errors import DiskFailed
from kvstore.store import BlockStore
from kvstore.tiers.tier import BlockRun, Tier
from tests.kvstore.scripted_disk import (
    ScriptedDisk,
    begun,
    chain,
    check_content,
    keep,
    nothing_is_held,
    open_store,
    reserve,
    until,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")


async def test_blocks_on_disk_come_to_memory_when_they_are_wanted(
    store: BlockStore, disk: ScriptedDisk
) -> None:
    run = chain(4)
    disk.hold(run)
    keep(store, run.part(0, 2))
    assert store.lookup(run.keys) == (Tier.MEMORY, Tier.MEMORY, Tier.DISK, Tier.DISK)
    with await store.pin(run.keys) as pinned:
        check_content(store, pinned, run)
        assert pinned.tiers == (Tier.MEMORY, Tier.MEMORY, Tier.DISK, Tier.DISK)
        assert store.reserve(5) is None
    assert store.lookup(run.keys) == (Tier.MEMORY,) * 4
    assert disk.reads == [run.keys[2:]]
    assert disk.writes == []


async def test_a_part_of_a_chain_comes_without_what_is_before_it(
    store: BlockStore, disk: ScriptedDisk
) -> None:
    run = chain(6)
    disk.hold(run)
    with await store.pin(run.keys[4:]) as pinned:
        check_content(store, pinned, run.part(4, 6))
    with await store.pin(run.keys) as pinned:
        check_content(store, pinned, run)
        assert pinned.tiers == (Tier.DISK,) * 4 + (Tier.MEMORY,) * 2
    assert disk.reads == [run.keys[4:], run.keys[:4]]


async def test_those_who_want_the_same_blocks_share_one_read(store: BlockStore, disk: ScriptedDisk) -> None:
    run = chain(4)
    disk.hold(run)
    disk.go.clear()
    first = asyncio.create_task(store.pin(run.keys[:3]))
    await begun(disk)
    others = [asyncio.create_task(store.pin(run.keys)), asyncio.create_task(store.pin(run.keys[1:3]))]
    await asyncio.sleep(0)
    disk.go.set()
    for task, expected in zip((first, *others), (run.part(0, 3), run, run.part(1, 3)), strict=True):
        with await task as pinned:
            assert len(pinned.slots) == len(expected.keys)
            check_content(store, pinned, expected)
    assert disk.reads == [run.keys[:3], run.keys[3:]]


async def test_chains_that_part_share_the_read_of_what_they_share(
    store: BlockStore, disk: ScriptedDisk
) -> None:
    one, other = chain(4), chain(4, number=1)
    other = BlockRun(root=one.root, parent=one.root, first_position=0, keys=one.keys[:2] + other.keys[2:])
    disk.hold(one)
    disk.hold(other)
    disk.go.clear()
    tasks = [asyncio.create_task(store.pin(run.keys)) for run in (one, other)]
    await begun(disk)
    disk.go.set()
    for task, run in zip(tasks, (one, other), strict=True):
        with await task as pinned:
            assert len(pinned.slots) == 4
            check_content(store, pinned, run)
    assert disk.reads == [one.keys, other.keys[2:]]


async def test_a_corrupted_block_ends_the_run(store: BlockStore, disk: ScriptedDisk) -> None:
    run = chain(4)
    disk.hold(run)
    disk.corrupted.add(run.keys[2])
    with await store.pin(run.keys) as pinned:
        assert len(pinned.slots) == 2
        check_content(store, pinned, run)


async def test_more_than_memory_can_take_comes_as_far_as_it_goes(
    store: BlockStore, disk: ScriptedDisk
) -> None:
    run = chain(12)
    disk.hold(run)
    with reserve(store, 3), await store.pin(run.keys) as pinned:
        assert len(pinned.slots) == 5
        check_content(store, pinned, run)
        with await store.pin(chain(12).keys[5:]) as more:
            assert more.slots == ()


async def test_a_disk_that_fails_costs_only_what_it_held(store: BlockStore, disk: ScriptedDisk) -> None:
    run = chain(4)
    disk.hold(run)
    keep(store, run.part(0, 2))
    disk.failure = DiskFailed("it was removed")
    with await store.pin(run.keys) as pinned:
        assert len(pinned.slots) == 2
    keep(store, chain(2, number=1))
    await until(lambda: store.describe().num_missed_writes == 2)
    assert store.describe().tiers[Tier.DISK].num_errors == 1
    assert len(store.lookup(chain(2, number=1).keys)) == 2


async def test_a_disk_that_hangs_is_left_out_until_it_answers(disk: ScriptedDisk) -> None:
    store = open_store(8, disk=disk, disk_timeout_s=0.05)
    run = chain(4)
    disk.hold(run)
    keep(store, run.part(0, 1))
    disk.go.clear()
    with await store.pin(run.keys) as pinned:
        assert pinned.tiers == (Tier.MEMORY,)
    assert store.lookup(run.keys) == (Tier.MEMORY,)
    with await store.pin(run.keys[1:]) as pinned:
        assert pinned.slots == ()
    assert store.describe().tiers[Tier.DISK].num_errors == 1
    store.check()

    disk.go.set()

    await until(lambda: len(store.lookup(run.keys)) == 4)
    nothing_is_held(store)
    await store.close()


@pytest.mark.parametrize("num_turns", range(6))
async def test_a_pin_cancelled_before_its_read_is_done_leaves_nothing(
    store: BlockStore, disk: ScriptedDisk, num_turns: int
) -> None:
    run = chain(4)
    disk.hold(run)
    keep(store, run.part(0, 2))
    disk.go.clear()
    task = asyncio.create_task(store.pin(run.keys))
    for _ in range(num_turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    disk.go.set()
    await store.close()
    nothing_is_held(store)


@pytest.mark.parametrize("num_turns", range(6))
async def test_a_pin_cancelled_once_its_read_is_done_leaves_nothing(
    store: BlockStore, disk: ScriptedDisk, num_turns: int
) -> None:
    run = chain(4)
    disk.hold(run)
    task, other = asyncio.create_task(store.pin(run.keys)), asyncio.create_task(store.pin(run.keys))
    await begun(disk)
    for _ in range(num_turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.result().close()
    with await other as pinned:
        check_content(store, pinned, run)
        assert len(pinned.slots) == 4
    nothing_is_held(store)


async def test_what_is_dropped_while_it_is_read_does_not_come_back(
    store: BlockStore, disk: ScriptedDisk
) -> None:
    run = chain(4)
    disk.hold(run)
    disk.go.clear()
    task = asyncio.create_task(store.pin(run.keys))
    await begun(disk)
    dropping = asyncio.create_task(store.drop(run.root))
    await asyncio.sleep(0)
    disk.go.set()
    assert await dropping == 4
    with await task as pinned:
        assert pinned.slots == ()
    assert store.lookup(run.keys) == ()
    assert disk.num_erased == 1
