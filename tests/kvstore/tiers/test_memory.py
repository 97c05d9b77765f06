import numpy as np
import pytest

from kvstore.blocks import BlockKey
from kvstore.holdings import Holdings
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.tier import BlockRun, Tier

ROOT = BlockKey(b"the model's root")
A, B, C = (BlockKey(letter * 16) for letter in (b"A", b"B", b"C"))
RUN = BlockRun(root=ROOT, parent=ROOT, first_position=0, keys=(A, B))


def memory(num_bytes: int) -> MemoryTier:
    return MemoryTier(
        np.zeros(num_bytes, np.uint8), block_bytes=10, policy="lru", holdings=Holdings(), now_s=lambda: 5.0
    )


def test_its_slots_lie_in_the_buffer_it_was_given() -> None:
    buffer = np.zeros((3, 9), np.uint8)
    tier = MemoryTier(buffer, block_bytes=10, policy="lru", holdings=Holdings())
    tier.arena_SX[1] = 7
    assert tier.arena_SX.shape == (2, 10)
    assert buffer.reshape(-1)[10:20].tolist() == [7] * 10
    assert int(buffer.sum()) == 70


def test_a_buffer_too_small_for_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="9 bytes hold no block of 10"):
        memory(9)


def test_it_says_what_it_holds_and_counts_what_happens() -> None:
    tier = memory(20)
    assert tier.commit(RUN, tier.reserve(2)) == [True, True]
    tier.hit([A])
    assert tier.holdings.tier(B) is Tier.MEMORY
    (slot,) = tier.reserve(1)
    tier.free([slot])
    assert tier.holdings.tier(B) is None
    stats = tier.stats()
    assert (stats.num_blocks, stats.capacity_blocks, stats.used_bytes, stats.capacity_bytes) == (1, 2, 10, 20)
    assert (stats.num_hit_blocks, stats.num_stored_blocks, stats.num_evicted_blocks) == (1, 2, 1)
    assert [key for part in tier.drop_in_parts(None) for key in part] == [A]
    assert tier.holdings.tier(A) is None


def test_a_second_copy_of_a_block_is_let_go() -> None:
    tier = memory(40)
    first, second = tier.reserve(2), tier.reserve(2)
    tier.commit(RUN, first)
    assert tier.commit(RUN, second) == [False, False]
    assert tier.pin(RUN.keys) == first
    assert tier.num_idle == 2
    tier.check()
