"""Which slot holds the block of a key. Pure bookkeeping: it neither owns slots nor decides what to evict."""

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from kvstore.blocks import BlockKey

Slot = TypeVar("Slot")


class PrefixIndex(Generic[Slot]):
    """A map from block keys to slots. A key has one slot and a slot has one key."""

    def __init__(self) -> None:
        self._slot_of_key: dict[BlockKey, Slot] = {}

    def __len__(self) -> int:
        return len(self._slot_of_key)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._slot_of_key

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(self._slot_of_key)

    def get(self, key: BlockKey) -> Slot | None:
        return self._slot_of_key.get(key)

    def put(self, key: BlockKey, slot: Slot) -> bool:
        """Adds a block; False, and nothing changes, if the key has a slot already."""
        if key in self._slot_of_key:
            return False
        self._slot_of_key[key] = slot
        return True

    def put_each(self, keys: Sequence[BlockKey], slots: Sequence[Slot]) -> list[bool]:
        """As `put` one after the other."""
        added = dict(zip(keys, slots, strict=True))
        if len(added) == len(keys) and self._slot_of_key.keys().isdisjoint(added):
            self._slot_of_key.update(added)
            return [True] * len(keys)
        return [self.put(key, slot) for key, slot in zip(keys, slots, strict=True)]

    def remove(self, key: BlockKey) -> Slot:
        """Forgets a block; KeyError if it is not here."""
        return self._slot_of_key.pop(key)

    def longest_prefix(self, keys: Sequence[BlockKey], max_blocks: int) -> list[Slot]:
        """The slots of the longest run of blocks from the first key on, at most `max_blocks`."""
        slots = []
        for position in range(min(max_blocks, len(keys))):
            slot = self._slot_of_key.get(keys[position])
            if slot is None:
                break
            slots.append(slot)
        return slots
