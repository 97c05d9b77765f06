import random

import pytest

from control_plane.directory.block_index import BlockEvents, BlockIndex
from control_plane.directory.member import WorkerId
from kvstore.blocks import BlockKey

A, B = WorkerId("a"), WorkerId("b")


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "little"))


def keys(*numbers: int) -> tuple[BlockKey, ...]:
    return tuple(map(key, numbers))


def make_index(*, max_blocks_per_worker: int = 100, max_blocks: int = 1000) -> BlockIndex:
    return BlockIndex(max_blocks_per_worker=max_blocks_per_worker, max_blocks=max_blocks)


def test_the_overlap_ends_at_the_first_block_that_is_missing() -> None:
    index = make_index()
    assert index.apply(A, BlockEvents(sequence=1, stored=keys(1, 2, 4)))
    assert index.num_leading_blocks(A, keys(1, 2, 3, 4)) == 2
    assert index.num_leading_blocks(A, keys(1, 2)) == 2
    assert index.num_leading_blocks(A, keys(9, 1)) == 0
    assert index.num_leading_blocks(B, keys(1, 2)) == 0


def test_an_evicted_block_is_no_longer_held() -> None:
    index = make_index()
    index.apply(A, BlockEvents(sequence=1, stored=keys(1, 2)))
    index.apply(A, BlockEvents(sequence=2, removed=keys(2)))
    assert index.num_leading_blocks(A, keys(1, 2)) == 1


def test_a_gap_in_the_sequence_asks_for_a_snapshot_which_voids_what_was_known() -> None:
    index = make_index()
    index.apply(A, BlockEvents(sequence=1, stored=keys(1, 2)))
    assert not index.apply(A, BlockEvents(sequence=3, stored=keys(3)))
    assert index.num_leading_blocks(A, keys(3)) == 0
    assert index.apply(A, BlockEvents(sequence=9, snapshot=True, stored=keys(5)))
    assert index.num_leading_blocks(A, keys(1)) == 0
    assert index.apply(A, BlockEvents(sequence=10, stored=keys(6)))
    assert index.num_leading_blocks(A, keys(5, 6)) == 2


def test_events_sent_again_because_the_answer_was_lost_change_nothing() -> None:
    index = make_index()
    events = BlockEvents(sequence=1, stored=keys(1, 2))
    assert index.apply(A, events)
    assert index.apply(A, events)
    assert len(index) == 2


def test_events_of_the_past_are_refused() -> None:
    index = make_index()
    for sequence in (1, 2, 3):
        index.apply(A, BlockEvents(sequence=sequence, stored=keys(sequence)))
    assert not index.apply(A, BlockEvents(sequence=1, removed=keys(3)))
    assert index.num_leading_blocks(A, keys(1, 2, 3)) == 3


def test_a_full_worker_forgets_what_it_announced_least_recently() -> None:
    index = make_index(max_blocks_per_worker=3)
    index.apply(A, BlockEvents(sequence=1, stored=keys(1, 2, 3)))
    index.apply(A, BlockEvents(sequence=2, stored=keys(1, 4)))
    assert index.num_leading_blocks(A, keys(1, 3, 4)) == 3
    assert index.num_leading_blocks(A, keys(2)) == 0
    index.check()


def test_a_full_index_forgets_the_least_recently_announced_of_all_workers() -> None:
    index = make_index(max_blocks_per_worker=3, max_blocks=4)
    index.apply(A, BlockEvents(sequence=1, stored=keys(1, 2)))
    index.apply(B, BlockEvents(sequence=1, stored=keys(1, 2, 3)))
    assert index.num_leading_blocks(A, keys(2)) == 1
    assert index.num_leading_blocks(A, keys(1)) == 0
    assert index.num_leading_blocks(B, keys(1, 2, 3)) == 3
    index.check()


def test_a_worker_that_is_forgotten_leaves_room() -> None:
    index = make_index(max_blocks_per_worker=2, max_blocks=2)
    index.apply(A, BlockEvents(sequence=1, stored=keys(1, 2)))
    index.forget(A)
    assert len(index) == 0
    assert index.apply(A, BlockEvents(sequence=1, stored=keys(3)))  # its numbers begin anew


def test_impossible_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="got 5 and 4"):
        make_index(max_blocks_per_worker=5, max_blocks=4)


@pytest.mark.parametrize("seed", range(5))
def test_bounds_and_books_hold_after_any_events(seed: int) -> None:
    rng = random.Random(seed)
    index = make_index(max_blocks_per_worker=20, max_blocks=30)
    held: dict[WorkerId, set[int]] = {A: set(), B: set()}
    sequences = {A: 0, B: 0}
    for _ in range(300):
        worker = rng.choice((A, B))
        stored, removed = rng.sample(range(60), 5), rng.sample(range(60, 120), 5)
        snapshot = rng.random() < 0.05
        sequences[worker] += 1
        if rng.random() < 0.03:
            index.forget(worker)
            held[worker], sequences[worker] = set(), 1
        index.apply(
            worker,
            BlockEvents(
                sequence=sequences[worker],
                snapshot=snapshot,
                stored=keys(*stored),
                removed=keys(*removed, *rng.sample(range(60), 3)),
            ),
        )
        held[worker] = (set() if snapshot else held[worker]) | set(stored)
        index.check()
        wrong = [n for n in range(60) if index.num_leading_blocks(worker, keys(n)) and n not in held[worker]]
        assert not wrong
