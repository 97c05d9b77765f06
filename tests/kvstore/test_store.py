"""The store over memory and a disk that does what the test says: waits, fails, lies, hangs."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from kvstore import disk_backlog, residency
from kvstore.blocks import BlockKey, chain_keys, root_key
from kvstore.disk_io import Disk
from kvstore.errors import DiskFailed
from kvstore.holdings import Holdings
from kvstore.store import BlockStore, PinnedBlocks, Reservation
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.tier import BlockRun, HeldPrefix, Tier, TierStats

pytestmark = pytest.mark.usefixtures("nothing_is_left")

BLOCK_BYTES = 64
SOON_S = 5.0


def chain(num_blocks: int, *, number: int = 0, salt: str = "") -> BlockRun:
    root = root_key(model_fingerprint=b"model", cache_salt=salt)
    token_ids = [number * 1000 + block for block in range(num_blocks) for _ in range(16)]
    return BlockRun(root=root, parent=root, first_position=0, keys=tuple(chain_keys(root, token_ids)))


def content(key: BlockKey) -> NDArray[np.uint8]:
    return np.frombuffer(key * (BLOCK_BYTES // len(key)), np.uint8)


class ScriptedDisk:
    """Holds blocks for as long as they are not dropped. Reads and writes wait until `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.failure: Exception | None = None
        self.begun = threading.Semaphore(0)
        self.reads: list[tuple[BlockKey, ...]] = []
        self.writes: list[tuple[BlockKey, ...]] = []
        self.corrupted: set[BlockKey] = set()
        self.num_erased = 0
        self.is_closed = False
        self._blocks: dict[BlockKey, tuple[BlockRun, bytes]] = {}
        self._changes: dict[BlockKey, bool] = {}

    def hold(self, run: BlockRun) -> None:
        for index, key in enumerate(run.keys):
            self._blocks[key] = run.part(index, index + 1), content(key).tobytes()
            self._changes[key] = True

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._blocks

    def run(self, keys: Sequence[BlockKey]) -> BlockRun | None:
        num_held = next((n for n, key in enumerate(keys) if key not in self._blocks), len(keys))
        return self._blocks[keys[0]][0].extended(tuple(keys[1:num_held])) if num_held else None

    def write(self, run: BlockRun, blocks: Sequence[NDArray[np.uint8]]) -> None:
        self.writes.append(run.keys)
        self._wait()
        for key, block in zip(run.keys, blocks, strict=True):
            assert block.tobytes() == content(key).tobytes()
        self.hold(run)

    def read(self, keys: Sequence[BlockKey], into: Sequence[NDArray[np.uint8]]) -> int:
        self.reads.append(tuple(keys))
        self._wait()
        for num_read, (key, block) in enumerate(zip(keys, into, strict=True)):
            if key in self.corrupted or key not in self._blocks:
                return num_read
            block[:] = np.frombuffer(self._blocks[key][1], np.uint8)
        return len(keys)

    def drop(self, root: BlockKey | None) -> int:
        dropped = [key for key, (run, _) in self._blocks.items() if root in (None, run.root)]
        for key in dropped:
            del self._blocks[key]
            self._changes[key] = False
        return len(dropped)

    def erase_dropped(self) -> None:
        self._wait()
        self.num_erased += 1

    def take_changes(self) -> tuple[list[BlockKey], list[BlockKey]]:
        changes, self._changes = self._changes, {}
        return [key for key in changes if changes[key]], [key for key in changes if not changes[key]]

    def stats(self) -> TierStats:
        return TierStats(
            num_blocks=len(self._blocks), capacity_blocks=100, used_bytes=0, capacity_bytes=0,
            num_hit_blocks=0, num_stored_blocks=0, num_evicted_blocks=0, num_errors=0,
        )  # fmt: skip

    def prefixes(self, max_prefixes: int) -> list[HeldPrefix]:
        return []

    def close(self) -> None:
        self.is_closed = True

    def _wait(self) -> None:
        self.begun.release()
        assert self.go.wait(SOON_S)
        if self.failure is not None:
            raise self.failure


def open_store(num_slots: int, *, disk: Disk | None = None, disk_timeout_s: float = SOON_S) -> BlockStore:
    memory = MemoryTier(
        np.zeros(num_slots * BLOCK_BYTES + 3, np.uint8),
        block_bytes=BLOCK_BYTES,
        policy="lru",
        holdings=Holdings(),
    )
    return BlockStore(memory, disk=disk, disk_timeout_s=disk_timeout_s)


def reserve(store: BlockStore, num_blocks: int) -> Reservation:
    reservation = store.reserve(num_blocks)
    assert reservation is not None
    return reservation


def keep(store: BlockStore, run: BlockRun) -> None:
    with reserve(store, len(run.keys)) as reservation:
        for slot, key in zip(reservation.slots, run.keys, strict=True):
            store.arena_SX[slot] = content(key)
        reservation.commit(run, slots=reservation.slots)
    store.check()


def check_content(store: BlockStore, pinned: PinnedBlocks, run: BlockRun) -> None:
    for slot, key in zip(pinned.slots, run.keys, strict=False):
        assert np.array_equal(store.arena_SX[slot], content(key))


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not is_so():  # noqa: ASYNC110  a thread changes it
            await asyncio.sleep(0)


async def begun(disk: ScriptedDisk) -> None:
    """One more read, write or erasure has begun."""
    assert await asyncio.to_thread(disk.begun.acquire, timeout=SOON_S)


def can_reserve(store: BlockStore, num_blocks: int) -> bool:
    reservation = store.reserve(num_blocks)
    if reservation is not None:
        reservation.close()
    return reservation is not None


def nothing_is_held(store: BlockStore) -> None:
    """Every slot can be had: none is pinned, none reserved."""
    store.check()
    assert can_reserve(store, len(store.arena_SX))


@pytest_asyncio.fixture
async def disk() -> AsyncIterator[ScriptedDisk]:
    scripted = ScriptedDisk()
    before = set(threading.enumerate())
    yield scripted
    await until(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith("kv-disk")])


@pytest_asyncio.fixture
async def store(disk: ScriptedDisk) -> AsyncIterator[BlockStore]:
    """Eight slots over a disk."""
    opened = open_store(8, disk=disk)
    yield opened
    disk.go.set()
    await opened.close()
    assert disk.is_closed
    nothing_is_held(opened)


async def test_what_was_committed_is_found_pinned_and_counted() -> None:
    store = open_store(4)
    run = chain(3)
    keep(store, run.part(0, 2))
    assert store.lookup(run.keys) == (Tier.MEMORY, Tier.MEMORY)
    with await store.pin(run.keys) as pinned:
        check_content(store, pinned, run)
        assert pinned.tiers == (Tier.MEMORY, Tier.MEMORY)
        assert store.reserve(3) is None
    nothing_is_held(store)
    stats = store.describe().tiers[Tier.MEMORY]
    assert (stats.num_hit_blocks, stats.num_stored_blocks, stats.num_evicted_blocks) == (2, 2, 2)
    await store.close()


async def test_nothing_can_be_reserved_where_all_is_pinned_and_nothing_leaves_for_it() -> None:
    store = open_store(4)
    keep(store, chain(2))
    keep(store, chain(2, number=1))
    with await store.pin(chain(2).keys):
        assert store.reserve(3) is None
        assert len(store.lookup(chain(2, number=1).keys)) == 2
        reserve(store, 2).close()
    assert store.reserve(5) is None


async def test_a_reservation_gives_back_what_was_not_committed_once() -> None:
    store = open_store(4)
    run = chain(2)
    reservation = reserve(store, 4)
    reservation.commit(run, slots=reservation.slots[2:])
    with pytest.raises(ValueError, match="do not fit"):
        reservation.commit(run, slots=reservation.slots[2:])
    with pytest.raises(ValueError, match="2 blocks do not fit"):
        reservation.commit(run, slots=reservation.slots[:1])
    reservation.close()
    reservation.close()
    assert len(store.lookup(run.keys)) == 2
    nothing_is_held(store)


async def test_the_second_of_two_writers_loses_quietly() -> None:
    store = open_store(4)
    run = chain(2)
    first, second = reserve(store, 2), reserve(store, 2)
    for reservation in (first, second):
        for slot, key in zip(reservation.slots, run.keys, strict=True):
            store.arena_SX[slot] = content(key)
        reservation.commit(run, slots=reservation.slots)
        reservation.close()
    with await store.pin(run.keys) as pinned:
        assert pinned.slots == first.slots
    nothing_is_held(store)


async def test_dropped_blocks_are_gone_at_once_and_their_slots_when_they_are_unpinned() -> None:
    store = open_store(2)
    keep(store, chain(2))
    pinned = await store.pin(chain(2).keys)
    assert await store.drop(chain(2).root) == 2
    assert store.lookup(chain(2).keys) == ()
    check_content(store, pinned, chain(2))
    assert store.reserve(1) is None
    pinned.close()
    pinned.close()
    nothing_is_held(store)


async def test_a_tenant_is_never_served_what_another_computed(store: BlockStore, disk: ScriptedDisk) -> None:
    """The same tokens under another salt: neither in memory nor on disk."""
    ours, theirs = chain(3, salt="A"), chain(3, salt="B")
    keep(store, ours)
    await until(lambda: ours.keys[2] in disk)
    assert store.lookup(theirs.keys) == ()
    with await store.pin(theirs.keys) as pinned:
        assert pinned.slots == ()
    keep(store, theirs)
    await until(lambda: theirs.keys[2] in disk)
    assert await store.drop(theirs.root) == 3
    assert len(store.lookup(ours.keys)) == 3


async def test_holdings_follow_blocks_through_the_tiers(store: BlockStore, disk: ScriptedDisk) -> None:
    run = chain(8)
    keep(store, run)
    assert store.holdings.tier(run.keys[7]) is Tier.MEMORY
    await until(lambda: len(disk.writes) == 4 and run.keys[7] in disk)
    await until(lambda: can_reserve(store, 1))
    assert store.holdings.tier(run.keys[7]) is Tier.DISK
    await store.drop(None)
    assert store.holdings.tier(run.keys[7]) is None


async def test_a_disk_announces_what_it_held_before() -> None:
    disk = ScriptedDisk()
    disk.hold(chain(2))
    store = open_store(2, disk=disk)
    assert store.holdings.tier(chain(2).keys[1]) is Tier.DISK
    await store.close()


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


async def test_a_description_has_every_tier_and_the_longest_lived_prefixes(store: BlockStore) -> None:
    keep(store, chain(2))
    keep(store, chain(3, number=1))
    description = store.describe(max_prefixes=1)
    assert set(description.tiers) == {Tier.MEMORY, Tier.DISK}
    ((tier, prefix),) = description.prefixes
    assert (tier, prefix.last_key, prefix.num_blocks) == (Tier.MEMORY, chain(2).keys[1], 2)
    assert store.describe().prefixes == ()
    assert description.tiers[Tier.MEMORY].capacity_bytes == 8 * BLOCK_BYTES


@pytest.mark.parametrize("seed", range(3))
async def test_traffic_with_cancellations_drops_and_a_bad_disk_leaves_nothing_behind(
    store: BlockStore, disk: ScriptedDisk, seed: int
) -> None:
    rng = random.Random(seed)

    async def use(run: BlockRun) -> None:
        with await store.pin(run.keys) as pinned:
            check_content(store, pinned, run)
            await asyncio.sleep(0)
            check_content(store, pinned, run)

    async def compute(run: BlockRun) -> None:
        reservation = store.reserve(len(run.keys))
        if reservation is not None:
            with reservation:
                await asyncio.sleep(0)
                for slot, key in zip(reservation.slots, run.keys, strict=True):
                    store.arena_SX[slot] = content(key)
                reservation.commit(run, slots=reservation.slots)

    tasks: list[asyncio.Task[object]] = []
    for _ in range(400):
        run = chain(rng.randint(1, 5), number=rng.randint(0, 4), salt=rng.choice("AB"))
        match rng.randrange(8):
            case 0 | 1 | 2:
                tasks.append(asyncio.create_task(use(run)))
            case 3 | 4:
                tasks.append(asyncio.create_task(compute(run)))
            case 5 if tasks:
                rng.choice(tasks[-8:]).cancel()
            case 6:
                tasks.append(asyncio.create_task(store.drop(rng.choice((None, run.root)))))
            case _:
                disk.failure = rng.choice((None, None, DiskFailed("full")))
                disk.corrupted ^= {rng.choice(run.keys)}
        await asyncio.sleep(0)
        store.check()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert result is None or isinstance(result, int | asyncio.CancelledError)
    await store.close()
    nothing_is_held(store)


async def test_the_most_valuable_is_what_was_used_last_and_no_disk_has() -> None:
    disk = ScriptedDisk()
    old, new, split = chain(3, number=1), chain(4, number=2), chain(5, number=3)
    store = open_store(12, disk=disk)
    disk.failure = DiskFailed("full")
    for run in (old, new, split):
        keep(store, run)
    disk.hold(split.part(1, 3))
    assert store.most_valuable(max_blocks=7) == [split.part(0, 1), split.part(3, 5), new]
    assert store.most_valuable(max_blocks=4) == [split.part(0, 1), split.part(3, 5), new.part(0, 1)]
    assert sum(len(run.keys) for run in store.most_valuable(max_blocks=100)) == 10
    await store.close()
