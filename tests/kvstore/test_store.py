"""The store over memory and a disk: what is found, counted, announced and dropped."""

import asyncio
import random

import pytest

from kvstore.errors import DiskFailed
from kvstore.store import BlockStore
from kvstore.tiers.tier import BlockRun, Tier
from tests.kvstore.scripted_disk import (
    BLOCK_BYTES,
    ScriptedDisk,
    can_reserve,
    chain,
    check_content,
    content,
    keep,
    nothing_is_held,
    open_store,
    reserve,
    until,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")


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
