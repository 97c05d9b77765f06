"""Which block lies where on disk, and what of each segment is still wanted. Pure bookkeeping, changed under a lock."""

import itertools
from collections.abc import Iterator, Sequence

from kvstore.blocks import BlockKey
from kvstore.placement import stretches
from kvstore.residency import Residency
from kvstore.tiers.placed import Placed, Record
from kvstore.tiers.segment import Segment
from kvstore.tiers.tier import BlockRun, HeldPrefix


class DiskIndex:
    """What it holds and drops is decided by a `Residency`, whose slots stand for room on the disk."""

    def __init__(self, num_slots: int, *, policy: str) -> None:
        self.num_evicted = 0
        self._residency = Residency(num_slots, policy=policy)
        self._records: dict[BlockKey, Record] = {}
        self._live: dict[Segment, dict[BlockKey, None]] = {}
        self._changes: dict[BlockKey, bool] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: BlockKey) -> bool:
        """Needs no lock."""
        return key in self._records

    @property
    def num_slots(self) -> int:
        return self._residency.num_slots

    def longest_prefix(self, keys: Sequence[BlockKey]) -> int:
        """How many blocks from the first key on are held. Needs no lock."""
        return next((n for n, key in enumerate(keys) if key not in self._records), len(keys))

    def run(self, keys: Sequence[BlockKey]) -> BlockRun | None:
        """The leading ones of these that are held, with their place in the chain."""
        num_held = self.longest_prefix(keys)
        return self._residency.run(keys[:num_held]) if num_held else None

    def use(self, keys: Sequence[BlockKey], *, now_s: float) -> list[Placed]:
        """Where the longest run of blocks from the first key on lies; they count as used."""
        used = keys[: self.longest_prefix(keys)]
        self._residency.touch(used, now_s=now_s)
        placed: list[Placed] = []
        for key in used:
            placed.append(self._records[key].block(key, after=placed[-1] if placed else None))
        return placed

    def missing(self, run: BlockRun) -> list[tuple[int, int]]:
        """The (start, stop) of those stretches of the run that are not held."""
        if self._records.keys().isdisjoint(run.keys):
            return [(0, len(run.keys))]
        return stretches([key not in self._records for key in run.keys])

    def reserve(self, run: BlockRun, *, now_s: float) -> list[int]:
        """Slots for the leading blocks of the run: fewer than it has if the rest of the slots is reserved too."""
        # What the run continues must not be dropped for it.
        pinned = self._residency.pin([run.parent])
        slots, dropped = self._residency.reserve(len(run.keys), now_s=now_s)
        self._residency.unpin(pinned)
        for key in dropped:
            self._take_out(key)
        self.num_evicted += len(dropped)
        return slots

    def free(self, slots: Sequence[int]) -> None:
        self._residency.free(slots)

    def put(self, slots: Sequence[int], record: Record, *, start: int = 0, now_s: float) -> None:
        """The reserved slots stand for the blocks of a record, from number `start` on; one that is held already frees
        its slot."""
        if not slots:
            return
        run = record.header.run.part(start, start + len(slots))
        is_new = self._residency.commit(slots, run=run, now_s=now_s)
        keys = dict.fromkeys(itertools.compress(run.keys, is_new))
        if keys:
            self._records.update(dict.fromkeys(keys, record))
            self._live.setdefault(record.segment, {}).update(keys)
            self._changes.update(dict.fromkeys(keys, True))

    def restore(self, record: Record, *, used_s: float) -> None:
        """One that was there at the start. Of two copies of a block the younger one counts."""
        run = record.header.run
        known = [self._records.get(key) for key in run.keys]
        for key, old in zip(run.keys, known, strict=True):
            if old is not None and _age(record) > _age(old):
                self.move(old.block(key), record)
        for start, stop in stretches([old is None for old in known]):
            slots = self.reserve(run.part(start, stop), now_s=used_s)
            self.put(slots, record, start=start, now_s=used_s)

    def begin(self) -> None:
        """All is restored: what was found twice or did not fit any more was never here."""
        self.num_evicted = 0
        self._changes = dict.fromkeys(self._records, True)

    def move(self, old: Placed, new: Record) -> None:
        """The block lies in another record now, unless it was dropped or moved meanwhile."""
        if self._is_there(old):
            self._unlist(old.key, old.segment)
            self._records[old.key] = new
            self._live.setdefault(new.segment, {})[old.key] = None

    def forget(self, blocks: Sequence[Placed]) -> int:
        """Takes out those that still lie there (and what the residency drops with them); how many that were."""
        keys = [block.key for block in blocks if self._is_there(block)]
        removed = self._residency.remove(keys)
        for key in removed:
            self._take_out(key)
        return len(removed)

    def evict(self, blocks: Sequence[Placed]) -> None:
        """Takes them out because their room is needed."""
        self.num_evicted += self.forget(blocks)

    def drop_in_parts(self, root: BlockKey | None) -> Iterator[int]:
        """Takes out all blocks of a root, or just all; how many that were. Between two parts, all else may go on."""
        for keys in self._residency.drop_in_parts(root):
            for key in keys:
                self._take_out(key)
            yield len(keys)

    def live_in(self, segment: Segment) -> list[Placed]:
        """Its blocks that are still wanted, in the order of the file."""
        records = {self._records[key] for key in self._live.get(segment, ())}
        blocks = [
            record.nth_block(nth)
            for record in records
            for nth, key in enumerate(record.header.run.keys)
            if self._records.get(key) is record
        ]
        return sorted(blocks, key=lambda block: block.offset)

    def emptiest(self, segments: Sequence[Segment]) -> Segment | None:
        """The one of which the smallest part is still wanted."""
        return min(segments, key=self._live_share, default=None)

    def last_used_s(self, blocks: Sequence[Placed]) -> float:
        """Zero if none of them is held any more."""
        return max(self._residency.last_used_s(block.key) or 0.0 for block in blocks)

    def take_changes(self) -> tuple[list[BlockKey], list[BlockKey]]:
        """(stored, removed) since the last call; a key is in one of them."""
        changes, self._changes = self._changes, {}
        stored = [key for key, is_stored in changes.items() if is_stored]
        return stored, [key for key, is_stored in changes.items() if not is_stored]

    def prefixes(self, max_prefixes: int, *, now_s: float) -> list[HeldPrefix]:
        return self._residency.prefixes(max_prefixes, now_s=now_s)

    def check(self) -> None:
        """That residency, places and segments tell the same."""
        self._residency.check()
        assert set(self._residency) == self._records.keys(), "residency and places differ"
        live = {key: segment for segment, keys in self._live.items() for key in keys}
        assert live == {key: record.segment for key, record in self._records.items()}, (
            "a segment's blocks differ"
        )
        for key, record in self._records.items():
            assert key in record.header.run.keys, "a block lies under another key"

    def _live_share(self, segment: Segment) -> float:
        return len(self._live.get(segment, ())) * segment.stored_bytes / max(1, segment.blocks_bytes)

    def _take_out(self, key: BlockKey) -> None:
        self._unlist(key, self._records.pop(key).segment)
        self._changes[key] = False

    def _unlist(self, key: BlockKey, segment: Segment) -> None:
        of_segment = self._live[segment]
        del of_segment[key]
        if not of_segment:
            del self._live[segment]

    def _is_there(self, block: Placed) -> bool:
        return self._records.get(block.key) is block.record


def _age(record: Record) -> tuple[int, int]:
    return record.segment.number, record.header.first_block
