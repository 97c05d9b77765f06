from kvstore.blocks import BlockKey
from kvstore.chains import Chains

A, B, C, D = (BlockKey(bytes([letter]) * 16) for letter in b"ABCD")


def test_a_block_knows_what_it_continues_and_how_many_continue_it() -> None:
    chains = Chains(4)
    chains.add(0, A, parent_key=None, parent=None)
    chains.add(1, B, parent_key=A, parent=0)
    chains.add(2, C, parent_key=A, parent=0)
    assert [chains.num_children(slot) for slot in range(4)] == [2, 0, 0, 0]
    assert chains.parent(2) == 0
    assert chains.remove(2) == 0
    chains.check({A: 0, B: 1})


def test_blocks_that_come_before_their_parent_are_linked_when_it_comes() -> None:
    chains = Chains(4)
    chains.add(3, C, parent_key=B, parent=None)
    chains.add(2, D, parent_key=B, parent=None)
    assert chains.awaited(3) == B
    chains.add(0, B, parent_key=A, parent=None)
    assert (chains.parent(3), chains.awaited(3)) == (0, None)
    assert chains.num_children(0) == 2
    chains.check({B: 0, C: 3, D: 2})


def test_one_that_waits_can_leave() -> None:
    chains = Chains(2)
    chains.add(0, C, parent_key=B, parent=None)
    chains.add(1, D, parent_key=B, parent=None)
    assert chains.remove(0) is None
    chains.check({D: 1})
    assert chains.remove(1) is None
    chains.add(0, B, parent_key=None, parent=None)
    assert chains.num_children(0) == 0
    chains.check({B: 0})


def test_what_continues_a_block_that_is_cut_out_waits_for_it_to_come_back() -> None:
    chains = Chains(4)
    chains.add(0, A, parent_key=None, parent=None)
    chains.add(1, B, parent_key=A, parent=0)
    chains.add(2, C, parent_key=B, parent=1)
    assert chains.cut({1: B}) == {0}
    chains.check({A: 0, C: 2})
    chains.add(3, B, parent_key=A, parent=0)
    assert chains.parent(2) == 3
    chains.check({A: 0, B: 3, C: 2})


def test_a_whole_chain_is_cut_out_at_once() -> None:
    chains = Chains(3)
    for slot, (key, parent_key) in enumerate(((A, None), (B, A), (C, B))):
        chains.add(slot, key, parent_key=parent_key, parent=slot - 1 if slot else None)
    assert chains.cut({0: A, 1: B, 2: C}) == set()
    chains.check({})
