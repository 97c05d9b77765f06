"""Which held block continues which. Pure bookkeeping over slots, each operation O(blocks it is about)."""

import itertools
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvstore.blocks import BlockKey
from kvstore.tiers.tier import BlockRun

_NONE = -1


class Place(NamedTuple):
    """A block, and how many come before it in its chain. Peers say both: as nothing continues what does not lie right
    before it, no lie of theirs makes a chain that has no leaf, whose blocks could never leave."""

    key: BlockKey
    position: int


def continued_by(run: BlockRun) -> Place | None:
    """The block before a run; None if a chain begins with it."""
    return Place(run.parent, run.first_position - 1) if run.first_position else None


class Chains:
    """A block may come before its parent does, as chains are loaded from their end: it waits, and is linked when
    the parent comes. The children of a block are a doubly linked list, so that one leaves it without a search.
    """

    def __init__(self, num_slots: int) -> None:
        self._parents, self._first_children, self._next_siblings, self._previous_siblings = (
            array("i", [_NONE]) * num_slots for _ in range(4)
        )
        self._waiting: dict[Place, set[int]] = {}
        self._awaited: dict[int, Place] = {}

    def is_leaf(self, slot: int) -> bool:
        return self._first_children[slot] == _NONE

    def is_inner(self, slot: int) -> bool:
        """Exactly one block continues it: a chain neither ends nor parts here."""
        child = self._first_children[slot]
        return child != _NONE and self._next_siblings[child] == _NONE

    def parent(self, slot: int) -> int | None:
        """The held block that this one continues."""
        parent = self._parents[slot]
        return None if parent == _NONE else parent

    def awaited(self, slot: int) -> Place | None:
        """The block that this one continues, if that is not held."""
        return self._awaited.get(slot)

    def add(self, slots: Sequence[int], run: BlockRun, *, parent: int | None) -> None:
        """The slots, until now without links, hold the blocks of `run`; `parent` is the slot of the block before it,
        if that is held."""
        before = continued_by(run)
        if parent is not None:
            self._link(slots[0], parent)
        elif before is not None:
            self._wait(slots[0], before)
        parents, first_children = self._parents, self._first_children
        for above, slot in itertools.pairwise(slots):
            parents[slot] = above
            first_children[above] = slot
        if self._waiting:
            blocks = map(Place, run.keys, itertools.count(run.first_position))
            for slot, block in zip(slots, blocks, strict=True):
                for child in self._waiting.pop(block, ()):
                    del self._awaited[child]
                    self._link(child, slot)

    def remove(self, slot: int, block: Place) -> int | None:
        """Takes a block out and says which one it continued; those that continue it wait for it to come back."""
        for child in tuple(self._children(slot)):
            self._unlink(child, slot)
            self._wait(child, block)
        parent = self._parents[slot]
        if parent != _NONE:
            self._unlink(slot, parent)
            return parent
        continued = self._awaited.pop(slot, None)
        if continued is not None:
            siblings = self._waiting[continued]
            siblings.remove(slot)
            if not siblings:
                del self._waiting[continued]
        return None

    def check(self, slots: dict[Place, int]) -> None:
        """That links lead both ways, between held blocks alone, of which `slots` has all."""
        held = set(slots.values())
        linked = {child: slot for slot in range(len(self._parents)) for child in self._children(slot)}
        parents = {slot: parent for slot, parent in enumerate(self._parents) if parent != _NONE}
        assert linked == parents, "links do not lead both ways"
        assert parents.keys() | set(parents.values()) <= held, "a link to what is not held"
        assert {slot for waiting in self._waiting.values() for slot in waiting} == self._awaited.keys()
        for slot, continued in self._awaited.items():
            assert slot in held
            assert slot not in parents
            assert slot in self._waiting[continued]
            assert continued not in slots, "a block waits for a parent that is here"

    def _children(self, slot: int) -> Iterator[int]:
        child = self._first_children[slot]
        while child != _NONE:
            yield child
            child = self._next_siblings[child]

    def _link(self, slot: int, parent: int) -> None:
        following = self._first_children[parent]
        self._parents[slot] = parent
        self._first_children[parent] = slot
        self._next_siblings[slot] = following
        if following != _NONE:
            self._previous_siblings[following] = slot

    def _unlink(self, slot: int, parent: int) -> None:
        previous, following = self._previous_siblings[slot], self._next_siblings[slot]
        if previous == _NONE:
            self._first_children[parent] = following
        else:
            self._next_siblings[previous] = following
        if following != _NONE:
            self._previous_siblings[following] = previous
        self._parents[slot] = self._next_siblings[slot] = self._previous_siblings[slot] = _NONE

    def _wait(self, slot: int, continued: Place) -> None:
        self._waiting.setdefault(continued, set()).add(slot)
        self._awaited[slot] = continued
