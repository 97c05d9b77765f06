import functools
import random

import pytest

from control_plane.directory import holder_table
from control_plane.directory.block_events import BlockEvents
from control_plane.directory.block_index import BlockIndex
from control_plane.directory.holder_table import WAYS
from control_plane.directory.member import WorkerId
from control_plane.directory.overlap import Overlap
from kvstore.blocks import BlockKey
from kvstore.tiers.tier import Tier

A, B = WorkerId("a"), WorkerId("b")


@functools.cache
def key(number: int) -> BlockKey:
    return BlockKey(random.Random(number).randbytes(16))


def keys(*numbers: int) -> tuple[BlockKey, ...]:
    return tuple(map(key, numbers))


def digests(*numbers: int) -> bytes:
    return b"".join(keys(*numbers))


def make_index(*, max_blocks: int = 1024) -> BlockIndex:
    return BlockIndex(max_blocks=max_blocks)


def store(
    index: BlockIndex, worker_id: WorkerId, *numbers: int, sequence: int = 1, tier: Tier = Tier.DEVICE
) -> None:
    tiers = bytes([tier]) * len(numbers)
    events = BlockEvents(sequence=sequence, stored=digests(*numbers), stored_tiers=tiers)
    assert index.apply(worker_id, events)


def num_leading(index: BlockIndex, worker_id: WorkerId, *numbers: int) -> int:
    overlap = index.overlaps(keys(*numbers)).get(worker_id)
    return 0 if overlap is None else overlap.num_blocks


def test_the_overlap_ends_at_the_first_block_that_is_missing() -> None:
    index = make_index()
    store(index, A, 1, 2, 4)
    assert num_leading(index, A, 1, 2, 3, 4) == 2
    assert num_leading(index, A, 1, 2) == 2
    assert num_leading(index, A, 9, 1) == 0
    assert num_leading(index, B, 1, 2) == 0
    assert index.overlaps(()) == {}


def test_one_lookup_tells_what_everybody_holds_and_where() -> None:
    index = make_index()
    store(index, A, 1, 2, 3)
    store(index, A, 2, 3, sequence=2, tier=Tier.MEMORY)
    store(index, A, 3, sequence=3, tier=Tier.DISK)
    store(index, B, 1, tier=Tier.DISK)
    assert index.overlaps(keys(1, 2, 3)) == {
        A: Overlap(num_device_blocks=1, num_memory_blocks=1, num_disk_blocks=1),
        B: Overlap(num_disk_blocks=1),
    }


@pytest.mark.parametrize("num_workers", [1, 31, 33, 100])
def test_many_workers_with_long_prefixes_are_told_apart(num_workers: int) -> None:
    index = make_index(max_blocks=1 << 16)
    for number in range(num_workers):
        store(index, WorkerId(f"w{number}"), *range(1, 50 * (number + 1)), tier=Tier(number % 3))
    found = index.overlaps(keys(*range(1, 10_000)))
    assert {name: overlap.num_blocks for name, overlap in found.items()} == {
        f"w{number}": 50 * (number + 1) - 1 for number in range(num_workers)
    }
    index.check()


def test_an_evicted_block_is_no_longer_held() -> None:
    index = make_index()
    store(index, A, 1, 2)
    store(index, B, 1, 2)
    index.apply(A, BlockEvents(sequence=2, removed=digests(2, 77)))
    assert (num_leading(index, A, 1, 2), num_leading(index, B, 1, 2)) == (1, 2)


def test_a_gap_in_the_sequence_asks_for_a_snapshot_which_voids_what_was_known() -> None:
    index = make_index()
    store(index, A, 1, 2)
    assert not index.apply(A, BlockEvents(sequence=3, stored=digests(3)))
    assert num_leading(index, A, 3) == 0
    assert index.apply(A, BlockEvents(sequence=9, snapshot=True, stored=digests(5)))
    assert num_leading(index, A, 1) == 0
    store(index, A, 6, sequence=10)
    assert num_leading(index, A, 5, 6) == 2


def test_events_sent_again_because_the_answer_was_lost_change_nothing() -> None:
    index = make_index()
    store(index, A, 1, 2)
    store(index, A, 1, 2)
    assert index.num_blocks == 2


def test_events_of_the_past_are_refused() -> None:
    index = make_index()
    for sequence in (1, 2, 3):
        store(index, A, sequence, sequence=sequence)
    assert not index.apply(A, BlockEvents(sequence=1, removed=digests(3)))
    assert num_leading(index, A, 1, 2, 3) == 3


def test_a_full_index_forgets_what_was_announced_least_recently() -> None:
    index = make_index(max_blocks=WAYS)
    for number in range(WAYS):
        store(index, A, number, sequence=number + 1)
    store(index, B, 0)  # again, by somebody else
    store(index, B, 99, sequence=2)
    assert num_leading(index, A, 1) == 0
    assert num_leading(index, A, 0) == num_leading(index, A, 2) == num_leading(index, B, 99) == 1
    index.check()


def test_a_lookup_keeps_what_it_finds() -> None:
    index = make_index(max_blocks=WAYS)
    for number in range(WAYS):
        store(index, A, number, sequence=number + 1)
    assert num_leading(index, A, 0, 1) == 2
    store(index, A, 98, 99, sequence=WAYS + 1)
    assert num_leading(index, A, 0, 1) == 2
    assert num_leading(index, A, 2) == num_leading(index, A, 3) == 0


def test_of_blocks_as_old_those_that_are_in_no_device_pages_go_first() -> None:
    index = make_index(max_blocks=WAYS)
    tiers = bytes([Tier.DEVICE] * 5 + [Tier.DISK] * 2 + [Tier.DEVICE] * (WAYS - 7))
    index.apply(A, BlockEvents(sequence=1, stored=digests(*range(WAYS)), stored_tiers=tiers))
    store(index, A, 98, 99, sequence=2)
    assert [number for number in range(WAYS) if not num_leading(index, A, number)] == [5, 6]


def test_what_nobody_holds_any_more_goes_before_all_else() -> None:
    index = make_index(max_blocks=WAYS)
    store(index, A, *range(WAYS - 1))
    store(index, B, 50)
    index.forget(B)
    store(index, A, 99, sequence=2)
    assert num_leading(index, A, *range(WAYS - 1), 99) == WAYS


def test_a_worker_that_is_forgotten_begins_anew_and_leaves_its_place_to_the_next() -> None:
    index = make_index()
    store(index, A, 1, 2)
    index.forget(A)
    index.forget(A)
    assert index.is_empty
    store(index, B, 3)
    assert num_leading(index, B, 1) == 0
    store(index, A, 3)
    assert index.overlaps(keys(3)).keys() == {A, B}
    index.check()


def test_a_digest_of_zeros_is_a_digest() -> None:
    index = make_index()
    zeros = BlockKey(bytes(16))
    assert index.overlaps((zeros,)) == {}
    index.apply(A, BlockEvents(sequence=1, stored=zeros))
    assert index.overlaps((zeros,)) == {A: Overlap(num_device_blocks=1)}


def test_the_memory_is_bounded_and_few_bytes_a_block() -> None:
    index = make_index(max_blocks=1 << 14)
    rng = random.Random(3)
    for sequence in range(1, 60):
        index.apply(A, BlockEvents(sequence=sequence, stored=rng.randbytes(16 * 1024)))
        index.check()
    assert index.num_blocks <= 1 << 14
    assert index.num_bytes / index.num_blocks < 24


def test_a_half_full_index_has_forgotten_next_to_nothing() -> None:
    index = make_index(max_blocks=1 << 12)
    store(index, A, *range(1 << 11))
    num_known = sum(num_leading(index, A, number) for number in range(1 << 11))
    assert num_known > 0.99 * (1 << 11)


def test_the_order_of_use_survives_the_end_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder_table, "_MAX_CLOCK", 40)
    index = make_index(max_blocks=WAYS)
    for number in range(200):
        store(index, A, number, sequence=number + 1)
        index.check()
    assert num_leading(index, A, 199) == num_leading(index, A, 198) == 1


def test_impossible_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="max_blocks must be positive, got 0"):
        make_index(max_blocks=0)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_held_that_was_not_announced_whatever_the_events(seed: int) -> None:
    rng = random.Random(seed)
    index = make_index(max_blocks=64)
    held: dict[WorkerId, dict[int, Tier]] = {A: {}, B: {}}
    sequences = {A: 0, B: 0}
    for _ in range(300):
        worker = rng.choice((A, B))
        stored = [rng.randrange(80) for _ in range(5)]  # a block may come twice
        removed = [number for number in rng.sample(range(80), 3) if number not in stored]
        tiers = {number: rng.choice((Tier.DEVICE, Tier.MEMORY, Tier.DISK)) for number in stored}
        snapshot = rng.random() < 0.05
        if rng.random() < 0.03:
            index.forget(worker)
            held[worker], sequences[worker] = {}, 0
        sequences[worker] += 1
        events = BlockEvents(
            sequence=sequences[worker],
            snapshot=snapshot,
            stored=digests(*stored),
            stored_tiers=bytes(tiers[number] for number in stored),
            removed=digests(*removed),
        )
        assert index.apply(worker, events)
        held[worker] = ({} if snapshot else held[worker]) | tiers
        for number in removed:
            held[worker].pop(number, None)
        index.check()
        for number in range(80):
            overlap = index.overlaps(keys(number)).get(worker)
            if overlap is not None:
                counts = (overlap.num_device_blocks, overlap.num_memory_blocks, overlap.num_disk_blocks)
                assert counts.index(1) == held[worker][number]
