"""Blocks on their way from memory to disk, and what is dropped on that way."""

import asyncio

import pytest

from kvstore import disk_backlog, residency
from kvstore.errors import DiskFailed
from kvstore.store import BlockStore
from tests.kvstore.scripted_disk import (
    ScriptedDisk,
    begun,
    can_reserve,
    chain,
    keep,
    open_store,
    reserve,
    until,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")


async def test_runs_that_continue_each_other_become_one_write(store: BlockStore, disk: ScriptedDisk) -> None:
    disk.go.clear()
    keep(store, chain(1, number=1))
    await begun(disk)
    run = chain(2)
    keep(store, run.part(0, 1))
    keep(store, chain(1, number=2))
    keep(store, run.part(1, 2))
    assert store.describe().num_waiting_writes == 3
    disk.go.set()
    await until(lambda: len(disk.writes) == 3)
    assert set(disk.writes[1:]) == {run.keys, chain(1, number=2).keys}


async def test_blocks_are_pinned_while_they_are_written_and_only_then(
    store: BlockStore, disk: ScriptedDisk
) -> None:
    disk.go.clear()
    keep(store, chain(2))
    keep(store, chain(2, number=1))
    await begun(disk)
    assert store.reserve(7) is None
    reserve(store, 6).close()
    assert store.lookup(chain(2, number=1).keys) == ()
    disk.go.set()
    await until(lambda: store.describe().num_missed_writes == 2)
    assert chain(2).keys[1] in disk


async def test_a_disk_that_is_behind_gets_less(
    store: BlockStore, disk: ScriptedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_backlog, "MAX_WAITING_BLOCKS", 3)
    disk.go.clear()
    keep(store, chain(1))
    await begun(disk)
    for number in range(1, 4):
        keep(store, chain(2, number=number))
    description = store.describe()
    assert (description.num_waiting_writes, description.num_missed_writes) == (2, 4)


async def test_what_is_on_disk_is_not_written_again(store: BlockStore, disk: ScriptedDisk) -> None:
    run = chain(4)
    disk.hold(run.part(1, 2))
    keep(store, run)
    await until(lambda: run.keys[3] in disk)
    assert disk.writes == [run.keys[:1], run.keys[2:]]


async def test_what_is_dropped_while_it_waits_or_is_written_is_not_on_disk(
    store: BlockStore, disk: ScriptedDisk
) -> None:
    disk.go.clear()
    keep(store, chain(2, salt="A"))
    await begun(disk)
    keep(store, chain(2, number=1, salt="A"))
    keep(store, chain(2, salt="B"))
    dropping = asyncio.create_task(store.drop(chain(2, salt="A").root))
    await asyncio.sleep(0)
    disk.go.set()
    assert await dropping == 4
    await until(lambda: chain(2, salt="B").keys[1] in disk)
    assert disk.stats().num_blocks == 2
    assert store.holdings.tier(chain(2, salt="A").keys[0]) is None


async def test_a_drop_lets_others_go_on_and_takes_all_that_was_there(
    store: BlockStore, disk: ScriptedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "SLOTS_PER_PART", 1)
    keep(store, chain(4, salt="A"))
    await until(lambda: chain(4, salt="A").keys[3] in disk)
    keep(store, chain(4, salt="B"))
    dropping = asyncio.create_task(store.drop(chain(1, salt="A").root))
    await asyncio.sleep(0)
    assert len(store.lookup(chain(4, salt="B").keys)) == 4
    pinned = await store.pin(chain(4, salt="A").keys)
    store.check()
    assert await dropping == 4
    assert store.lookup(chain(4, salt="A").keys) == ()
    assert len(store.lookup(chain(4, salt="B").keys)) == 4
    pinned.close()


async def test_nothing_of_a_root_is_read_from_disk_until_it_is_erased_there(
    store: BlockStore, disk: ScriptedDisk
) -> None:
    ours, theirs = chain(2, salt="A"), chain(2, salt="B")
    disk.hold(ours)
    disk.hold(theirs)
    disk.go.clear()
    keep(store, chain(1, number=1))
    await begun(disk)  # the write, which the erasure waits for
    dropping = asyncio.create_task(store.drop(ours.root))
    await asyncio.sleep(0)
    assert ours.keys[0] in disk
    with await store.pin(ours.keys) as pinned:
        assert pinned.slots == ()
    reading = asyncio.create_task(store.pin(theirs.keys))
    disk.go.set()
    assert await dropping == 2
    with await reading as pinned:
        assert len(pinned.slots) == 2
    disk.hold(ours)
    with await store.pin(ours.keys) as pinned:
        assert len(pinned.slots) == 2


async def test_a_drop_that_is_cancelled_still_erases_what_is_on_disk(
    store: BlockStore, disk: ScriptedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "SLOTS_PER_PART", 1)
    disk.hold(chain(4))
    keep(store, chain(4))
    dropping = asyncio.create_task(store.drop(None))
    await asyncio.sleep(0)
    dropping.cancel()
    await asyncio.wait({dropping})
    await until(lambda: disk.num_erased == 1)
    assert disk.stats().num_blocks == 0
    store.check()
    assert await store.drop(None) > 0
    assert store.lookup(chain(4).keys) == ()


async def test_blocks_that_come_or_are_used_again_while_they_wait_are_written_once(
    store: BlockStore, disk: ScriptedDisk
) -> None:
    disk.go.clear()
    keep(store, chain(2, number=1))
    await begun(disk)
    run = chain(4)
    keep(store, run)
    with await store.pin(run.keys[:3]):
        reserve(store, 3).close()
        assert len(store.lookup(run.keys)) == 3
    keep(store, run.part(3, 4))
    assert store.describe().num_waiting_writes == 4
    disk.go.set()
    await until(lambda: run.keys[3] in disk)
    assert disk.writes[1:] == [run.keys[:2], run.keys[2:]]
    assert store.describe().num_waiting_writes == 0


async def test_blocks_that_a_disk_missed_are_written_when_they_are_used_again(
    store: BlockStore, disk: ScriptedDisk
) -> None:
    run = chain(4)
    disk.failure = DiskFailed("full")
    keep(store, run)
    await until(lambda: store.describe().num_missed_writes == 4)
    disk.failure = None
    (await store.pin(run.keys[:3])).close()
    await until(lambda: run.keys[2] in disk)
    assert run.keys[3] not in disk


async def test_a_disk_that_fails_every_other_write_is_told_once(
    store: BlockStore, disk: ScriptedDisk, caplog: pytest.LogCaptureFixture
) -> None:
    num_missed = 0
    for number in range(6):
        disk.failure = DiskFailed("no space left") if number % 2 == 0 else None
        run = chain(1, number=number)
        keep(store, run)
        num_missed += disk.failure is not None
        await until(
            lambda: (
                (run.keys[0] in disk or disk.failure is not None)  # noqa: B023
                and store.describe().num_missed_writes == num_missed  # noqa: B023
                and not store.describe().num_waiting_writes
            )
        )
    (failed,) = caplog.messages
    assert "no space left" in failed


async def test_closing_writes_what_waits(disk: ScriptedDisk) -> None:
    store = open_store(8, disk=disk)
    for number in range(4):
        keep(store, chain(2, number=number))
    await store.close()
    assert disk.stats().num_blocks == 8
    keep(store, chain(1, number=9))
    assert store.describe().num_missed_writes == 1


async def test_closing_does_not_wait_for_a_disk_that_hangs(disk: ScriptedDisk) -> None:
    store = open_store(8, disk=disk)
    disk.go.clear()
    for number in range(4):
        keep(store, chain(2, number=number))
    await store.close(timeout_s=0.05)
    assert store.describe().num_missed_writes == 6
    disk.go.set()
    await until(lambda: can_reserve(store, 8))
