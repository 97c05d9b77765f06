"""Which held block continues which. Pure bookkeeping over slots."""

from array import array

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

    def add(self, slot: int, key: BlockKey, *, parent_key: BlockKey | None, parent: int | None) -> None:
        """`parent_key` is None for the first block of a chain; `parent`, the slot of that key, if it is not held."""
        if parent is not None:
            self._link(slot, parent)
        elif parent_key is not None:
            self._waiting.setdefault(parent_key, []).append(slot)
            self._awaited[slot] = parent_key
        for child in self._waiting.pop(key, ()):
            del self._awaited[child]
            self._link(child, slot)

    def remove(self, slot: int) -> int | None:
        """Takes a block out, whose children go too, and says which slot it continued."""
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

    def with_descendants(self, slots: set[int]) -> list[int]:
        found = set(slots)
        while more := {slot for slot, parent in enumerate(self._parents) if parent in found} - found:
            found |= more
        return sorted(found)

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
