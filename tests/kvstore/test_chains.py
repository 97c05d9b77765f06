import pytest

from kvstore.blocks import BlockKey
from kvstore.chains import Chains, Place
from kvstore.tiers.tier import BlockRun

ROOT = BlockKey(bytes(16))
A, B, C, D = (
    Place(BlockKey(bytes([letter]) * 16), position)
    for letter, position in zip(b"ABCD", (0, 1, 2, 2), strict=True)
)


def add(
    chains: Chains, slot: int, *blocks: Place, continued: Place | None = None, parent: int | None = None
) -> None:
    """`blocks` are consecutive, and in slots `slot` and following."""
    run = BlockRun(
        root=ROOT,
        parent=ROOT if continued is None else continued.key,
        first_position=blocks[0].position,
        keys=tuple(block.key for block in blocks),
    )
    chains.add(range(slot, slot + len(blocks)), run, parent=parent)


def test_a_block_knows_what_it_continues_and_how_many_continue_it() -> None:
    chains = Chains(4)
    add(chains, 0, A)
    add(chains, 1, B, continued=A, parent=0)
    add(chains, 2, C, continued=A, parent=0)
    assert [chains.is_leaf(slot) for slot in range(4)] == [False, True, True, True]
    assert not chains.is_inner(0)
    assert chains.parent(2) == 0
    assert chains.remove(2, C) == 0
    assert chains.is_inner(0)
    chains.check({A: 0, B: 1})


def test_blocks_that_come_before_their_parent_are_linked_when_it_comes() -> None:
    chains = Chains(4)
    add(chains, 3, C, continued=B)
    add(chains, 2, D, continued=B)
    assert chains.awaited(3) == B
    add(chains, 0, B, continued=A)
    assert (chains.parent(3), chains.awaited(3)) == (0, None)
    assert not chains.is_leaf(0)
    chains.check({B: 0, C: 3, D: 2})


def test_a_run_that_comes_at_once_is_linked_to_what_is_before_behind_and_beside_it() -> None:
    chains = Chains(4)
    add(chains, 0, A)
    add(chains, 3, D, continued=B)
    add(chains, 1, B, C, continued=A, parent=0)
    assert [chains.parent(slot) for slot in range(4)] == [None, 0, 1, 1]
    assert [chains.is_leaf(slot) for slot in range(4)] == [False, False, True, True]
    chains.check({A: 0, B: 1, C: 2, D: 3})


def test_one_that_waits_can_leave() -> None:
    chains = Chains(2)
    add(chains, 0, C, continued=B)
    add(chains, 1, D, continued=B)
    assert chains.remove(0, C) is None
    chains.check({D: 1})
    assert chains.remove(1, D) is None
    add(chains, 0, B, continued=A)
    assert chains.is_leaf(0)
    chains.check({B: 0})


def test_what_continues_a_block_that_is_taken_out_waits_for_it_to_come_back() -> None:
    chains = Chains(4)
    add(chains, 0, A)
    add(chains, 1, B, continued=A, parent=0)
    add(chains, 2, C, continued=B, parent=1)
    add(chains, 3, D, continued=B, parent=1)
    assert chains.remove(1, B) == 0
    assert chains.is_leaf(0)
    chains.check({A: 0, C: 2, D: 3})
    add(chains, 1, B, continued=A, parent=0)
    assert (chains.parent(2), chains.parent(3)) == (1, 1)
    chains.check({A: 0, B: 1, C: 2, D: 3})


@pytest.mark.parametrize("gone", range(3))
def test_any_of_several_that_continue_a_block_can_leave(gone: int) -> None:
    chains = Chains(4)
    held = {A: 0, B: 1, C: 2, D: 3}
    for key, slot in held.items():
        add(chains, slot, key, continued=A if slot else None, parent=0 if slot else None)
    key = (B, C, D)[gone]
    assert chains.remove(held.pop(key), key) == 0
    chains.check(held)
    assert not chains.is_leaf(0)
    assert not chains.is_inner(0)


def test_a_whole_chain_can_be_taken_out_from_its_beginning() -> None:
    chains = Chains(3)
    for slot, (key, parent_key) in enumerate(((A, None), (B, A), (C, B))):
        add(chains, slot, key, continued=parent_key, parent=slot - 1 if slot else None)
    assert [chains.remove(slot, key) for slot, key in enumerate((A, B, C))] == [None, None, None]
    chains.check({})
