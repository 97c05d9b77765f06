"""What one bounded tier holds, who uses it and what leaves next. Pure bookkeeping: it neither reads nor moves bytes.

A slot is free, reserved, or holds a block. Held blocks leave leaf first, so what remains of a chain is always a prefix
(a block that came before its parent did is the exception until the parent comes); pinned ones never leave.
"""

import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence

from kvstore.blocks import BLOCK_SIZE_TOKENS, BlockKey
from kvstore.chains import Chains, Place, continued_by
from kvstore.eviction import EvictionOrder
from kvstore.placement import POLICIES, stretches
from kvstore.prefix_index import PrefixIndex
from kvstore.tiers.tier import BlockRun, HeldPrefix

# What `drop_in_parts` looks at in one part: 1 to 2 ms, with what else forgets these blocks.
SLOTS_PER_PART = 256

# Looking for prefixes ends after so many blocks: 1 to 2 ms, and the longest-lived come first.
MAX_SCANNED_BLOCKS = 5_000


class Residency:
    def __init__(self, num_slots: int, *, policy: str, block_size_tokens: int = BLOCK_SIZE_TOKENS) -> None:
        if num_slots < 1:
            raise ValueError(f"a tier needs at least one slot, got {num_slots}")
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        self._num_slots = num_slots
        self._index: PrefixIndex[int] = PrefixIndex()
        self._free = list(range(num_slots - 1, -1, -1))
        self._reserved: set[int] = set()
        self._keys: list[BlockKey | None] = [None] * num_slots
        self._roots: list[BlockKey | None] = [None] * num_slots
        self._since_s = array("d", [0.0]) * num_slots
        self._num_hits = array("L", [0]) * num_slots
        self._pins: dict[int, int] = {}
        self._chains = Chains(num_slots)
        self._order = EvictionOrder(num_slots, policy=POLICIES[policy], block_size_tokens=block_size_tokens)
        self._now_s = 0.0

    def __len__(self) -> int:
        """Held blocks."""
        return len(self._index)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._index

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(self._index)

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def num_idle(self) -> int:
        """Slots that are neither reserved nor pinned: at most so many can be reserved now."""
        return self._num_slots - len(self._reserved) - len(self._pins)

    def get(self, key: BlockKey) -> int | None:
        return self._index.get(key)

    def longest_prefix(self, keys: Sequence[BlockKey], max_blocks: int) -> list[int]:
        """The slots of the longest run of held blocks from the first key on. Does not count as use."""
        return self._index.longest_prefix(keys, max_blocks)

    def last_used_s(self, key: BlockKey) -> float | None:
        """None unless it is held."""
        slot = self._index.get(key)
        return None if slot is None else self._order.last_used_s(slot)

    def touch(self, keys: Iterable[BlockKey], *, now_s: float) -> None:
        """Those that are held were used now."""
        at_s = self._tick(now_s)
        for key in keys:
            slot = self._index.get(key)
            if slot is not None:
                self._order.use(slot, at_s=at_s)
                self._num_hits[slot] += 1

    def reserve(
        self, num_slots: int, *, now_s: float, beside: BlockKey | None = None
    ) -> tuple[list[int], list[BlockKey]]:
        """Slots, and the keys that were dropped for them; fewer slots than wanted if the rest is in use. The block
        `beside`, which what they are for continues, stays."""
        at_s = self._tick(now_s)
        num_left = max(0, len(self._free) - num_slots)
        slots = self._free[num_left:][::-1]
        del self._free[num_left:]
        dropped: list[BlockKey] = []
        if len(slots) < num_slots:
            pinned = [] if beside is None else self.pin([beside])
            dropped = self._evict(num_slots - len(slots), at_s=at_s)
            self.unpin(pinned)
            slots += self._free
            self._free.clear()
        self._reserved.update(slots)
        return slots, dropped

    def commit(self, slots: Sequence[int], *, run: BlockRun, now_s: float) -> list[bool]:
        """The reserved slots hold the blocks of `run` from now on. False where another does already: this one is free
        then."""
        at_s = self._tick(now_s)
        # Before the index knows of slots that nothing is known of yet.
        parent = self._slot_of(continued_by(run))
        num_left = len(self._reserved) - len(slots)
        self._reserved.difference_update(slots)
        assert len(self._reserved) == num_left, "a slot is committed to that is not reserved"
        is_new = self._index.put_each(run.keys, slots)
        for start, stop in stretches(is_new):
            if start:
                parent = self._slot_of(Place(run.keys[start - 1], run.first_position + start - 1))
            self._fill(slots[start:stop], run.part(start, stop), parent=parent, at_s=at_s)
        if not all(is_new):
            self._free.extend(slot for slot, is_held in zip(slots, is_new, strict=True) if not is_held)
        return is_new

    def free(self, slots: Iterable[int]) -> None:
        """Reserved slots that nothing was committed to."""
        for slot in slots:
            self._reserved.remove(slot)
            self._free.append(slot)

    def pin(self, keys: Sequence[BlockKey]) -> list[int]:
        """The slots of the leading blocks that are held, which stay until they are unpinned as often."""
        slots = self._index.longest_prefix(keys, len(keys))
        for slot in slots:
            self._pins[slot] = self._pins.get(slot, 0) + 1
        return slots

    def unpin(self, slots: Iterable[int]) -> None:
        for slot in slots:
            num_pins = self._pins.pop(slot) - 1
            if num_pins:
                self._pins[slot] = num_pins
            elif self._keys[slot] is None:  # dropped while it was pinned
                self._free.append(slot)
            else:
                self._queue_if_idle(slot)

    def drop_in_parts(self, root: BlockKey | None) -> Iterator[list[BlockKey]]:
        """Forgets all blocks of a root, or just all, and says which; slots of pinned ones are free once unpinned.

        Anything may happen between two parts; what is committed meanwhile may stay.
        """
        for first in range(0, self._num_slots, SLOTS_PER_PART):
            keys = self._keys[first : first + SLOTS_PER_PART]
            roots = self._roots[first : first + SLOTS_PER_PART]
            yield self.remove(
                key
                for key, of_root in zip(keys, roots, strict=True)
                if key is not None and (root is None or of_root == root)
            )

    def remove(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """Forgets single blocks; those that continue them can no longer be reached and age.

        Says which were held; slots of pinned ones are free once unpinned.
        """
        removed: list[BlockKey] = []
        for key in keys:
            slot = self._index.get(key)
            if slot is not None:
                self._take_out(slot, key)
                removed.append(key)
        return removed

    def run(self, keys: Sequence[BlockKey]) -> BlockRun:
        """The leading ones of these that continue each other, and where they are. The first one is held."""
        slot = self._index.get(keys[0])
        assert slot is not None, f"block {keys[0].hex()} is not held"
        root, parent, awaited = self._roots[slot], self._chains.parent(slot), self._chains.awaited(slot)
        assert root is not None
        parent_key = (
            self._keys[parent] if parent is not None else awaited.key if awaited is not None else root
        )
        assert parent_key is not None
        return BlockRun(
            root=root,
            parent=parent_key,
            first_position=self._order.position(slot),
            keys=tuple(keys[: self._num_in_chain(keys, slot)]),
        )

    def prefixes(self, max_prefixes: int, *, now_s: float) -> list[HeldPrefix]:
        """Where chains end or part, longest held first."""
        found: list[HeldPrefix] = []
        for key in itertools.islice(self._index, MAX_SCANNED_BLOCKS):
            if len(found) == max_prefixes:
                break
            slot = self._index.get(key)
            assert slot is not None
            root = self._roots[slot]
            if root is not None and not self._chains.is_inner(slot):
                found.append(
                    HeldPrefix(
                        root=root,
                        last_key=key,
                        num_blocks=self._order.position(slot) + 1,
                        age_s=max(0.0, now_s - self._since_s[slot]),
                        idle_s=max(0.0, now_s - self._order.last_used_s(slot)),
                        num_hits=self._num_hits[slot],
                    )
                )
        return found

    def chains_by_value(self, *, now_s: float) -> Iterator[BlockRun]:
        """Every held block once, the chains with the most valuable ends first, each from its first block that is held
        and not told yet. Void once anything changes."""
        ends = [slot for slot, key in enumerate(self._keys) if key is not None and self._chains.is_leaf(slot)]
        ends.sort(key=lambda slot: self._order.value(slot, now_s=now_s), reverse=True)
        told: set[int] = set()
        for end in ends:
            keys: list[BlockKey] = []
            slot: int | None = end
            while slot is not None and slot not in told:
                key = self._keys[slot]
                assert key is not None, f"slot {slot} is indexed and empty"
                keys.append(key)
                told.add(slot)
                slot = self._chains.parent(slot)
            yield self.run(keys[::-1])

    def check(self) -> None:
        """That every slot is accounted for exactly once, and whatever may leave is queued to leave."""
        slots = {key: slot for slot, key in enumerate(self._keys) if key is not None}
        assert slots == {key: self._index.get(key) for key in self._index}, "index and slots differ"
        dropped = {slot for slot in self._pins if self._keys[slot] is None}
        owned = [*self._free, *self._reserved, *slots.values(), *dropped]
        assert sorted(owned) == list(range(self._num_slots)), "a slot is lost or has two owners"
        assert all(num_pins > 0 for num_pins in self._pins.values())
        for slot in slots.values():
            assert self._order.is_queued(slot) or not self._may_leave(slot), f"slot {slot} can never leave"
        self._chains.check({Place(key, self._order.position(slot)): slot for key, slot in slots.items()})
        self._order.check()

    def _tick(self, now_s: float) -> float:
        # Strictly later each time: within one reading of the clock the order is that of the calls.
        self._now_s = max(now_s, math.nextafter(self._now_s, math.inf))
        return self._now_s

    def _evict(self, num_blocks: int, *, at_s: float) -> list[BlockKey]:
        """Fewer if the rest is in use."""
        dropped: list[BlockKey] = []
        while len(dropped) < num_blocks:
            slot = self._order.next(now_s=at_s, may_leave=self._may_leave)
            if slot is None:
                break
            key = self._keys[slot]
            assert key is not None
            self._take_out(slot, key)
            dropped.append(key)
        return dropped

    def _fill(self, slots: Sequence[int], run: BlockRun, *, parent: int | None, at_s: float) -> None:
        held, roots, since_s, root = self._keys, self._roots, self._since_s, run.root
        for slot, key in zip(slots, run.keys, strict=True):
            held[slot] = key
            roots[slot] = root
            since_s[slot] = at_s
        self._order.place(slots, first_position=run.first_position, at_s=at_s)
        self._chains.add(slots, run, parent=parent)
        # Those before it are continued by it.
        self._queue_if_idle(slots[-1])

    def _slot_of(self, block: Place | None) -> int | None:
        if block is None or (slot := self._index.get(block.key)) is None:
            return None
        return slot if self._order.position(slot) == block.position else None

    def _num_in_chain(self, keys: Sequence[BlockKey], slot: int) -> int:
        """Of these, so many continue each other; the first one is in `slot`."""
        num_blocks = 1
        while num_blocks < len(keys) and (following := self._index.get(keys[num_blocks])) is not None:
            if self._chains.parent(following) != slot:
                break
            slot = following
            num_blocks += 1
        return num_blocks

    def _may_leave(self, slot: int) -> bool:
        return self._keys[slot] is not None and slot not in self._pins and self._chains.is_leaf(slot)

    def _queue_if_idle(self, slot: int) -> None:
        if self._may_leave(slot):
            self._order.queue(slot)

    def _take_out(self, slot: int, key: BlockKey) -> None:
        self._index.remove(key)
        self._keys[slot] = self._roots[slot] = None
        self._num_hits[slot] = 0
        parent = self._chains.remove(slot, Place(key, self._order.position(slot)))
        if parent is not None:
            self._queue_if_idle(parent)
        if slot not in self._pins:
            self._free.append(slot)
