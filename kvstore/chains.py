"""Which held block continues which. Pure bookkeeping over slots."""

from array import array
from collections.abc import Mapping

from kvstore.blocks import BlockKey

_NONE = -1


class Chains:
    """A block may come before its parent does, as chains are loaded from their end: it waits, and is linked when
    the parent comes."""

    def __init__(self, num_slots: int) -> None:
        self._parents = array("q", [_NONE]) * num_slots
        self._num_children = array("q", [0]) * num_slots
        self._waiting: dict[BlockKey, list[int]] = {}
        self._awaited: dict[int, BlockKey] = {}

    def num_children(self, slot: int) -> int:
        return self._num_children[slot]

    def parent(self, slot: int) -> int | None:
        """The held block that this one continues."""
        parent = self._parents[slot]
        return None if parent == _NONE else parent

    def awaited(self, slot: int) -> BlockKey | None:
        """The key of the block that this one continues, if that is not held."""
        return self._awaited.get(slot)

    def add(self, slot: int, key: BlockKey, *, parent_key: BlockKey | None, parent: int | None) -> None:
        """`parent_key` is None for the first block of a chain; `parent` is the slot of that key if it is held."""
        if parent is not None:
            self._link(slot, parent)
        elif parent_key is not None:
            self._wait(slot, parent_key)
        for child in self._waiting.pop(key, ()):
            del self._awaited[child]
            self._link(child, slot)

    def remove(self, slot: int) -> int | None:
        """Takes a block out that nothing continues, and says which one it continued."""
        parent = self._parents[slot]
        if parent != _NONE:
            self._parents[slot] = _NONE
            self._num_children[parent] -= 1
            return parent
        parent_key = self._awaited.pop(slot, None)
        if parent_key is not None:
            siblings = self._waiting[parent_key]
            siblings.remove(slot)
            if not siblings:
                del self._waiting[parent_key]
        return None

    def cut(self, keys: Mapping[int, BlockKey]) -> set[int]:
        """Takes the blocks in these slots out and says which others they continued; those that continue them wait."""
        num_inner = sum(self._parents[slot] in keys for slot in keys)
        if num_inner < sum(self._num_children[slot] for slot in keys):
            for child, parent in enumerate(self._parents):
                if parent in keys and child not in keys:
                    self.remove(child)
                    self._wait(child, keys[parent])
        parents = {self.remove(slot) for slot in keys}
        return {parent for parent in parents if parent is not None and parent not in keys}

    def check(self, slots: dict[BlockKey, int]) -> None:
        """That links and counts are those of the held blocks, of which `slots` has all."""
        num_children = [0] * len(self._parents)
        for slot in slots.values():
            if self._parents[slot] != _NONE:
                num_children[self._parents[slot]] += 1
        assert num_children == self._num_children.tolist(), "children are miscounted"
        held = set(slots.values())
        assert all(parent in held for parent in self._parents if parent != _NONE), "a parent is not held"
        assert {slot for waiting in self._waiting.values() for slot in waiting} == self._awaited.keys()
        for slot, parent_key in self._awaited.items():
            assert slot in held
            assert parent_key not in slots, "a block waits for a parent that is here"

    def _link(self, slot: int, parent: int) -> None:
        self._parents[slot] = parent
        self._num_children[parent] += 1

    def _wait(self, slot: int, parent_key: BlockKey) -> None:
        self._waiting.setdefault(parent_key, []).append(slot)
        self._awaited[slot] = parent_key
