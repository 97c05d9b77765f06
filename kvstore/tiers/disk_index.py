"""Which block lies where on disk, and what of each segment is still wanted. Pure bookkeeping, changed under a lock."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from kvstore.blocks import BlockKey
from kvstore.placement import stretches
from kvstore.residency import Residency
from kvstore.tiers.placed import Placed, Record
from kvstore.tiers.segment import Segment
from kvstore.tiers.tier import BlockRun, HeldPrefix


class _Live:
    """Of one segment: the records of which blocks are still wanted, and how many of each and of all."""

    def __init__(self) -> None:
        self.num_of: dict[Record, int] = {}
        self.num_blocks = 0


class DiskIndex:
    """What it holds and drops is decided by a `Residency`, whose slots stand for room on the disk."""

    def __init__(self, num_slots: int, *, policy: str) -> None:
        self.num_evicted = 0
        self._residency = Residency(num_slots, policy=policy)
        self._records: dict[BlockKey, Record] = {}
        self._live: dict[Segment, _Live] = {}
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
        slots, dropped = self._residency.reserve(len(run.keys), now_s=now_s, beside=run.parent)
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
        keys = run.keys if all(is_new) else tuple(itertools.compress(run.keys, is_new))
        if keys:
            self._records.update(dict.fromkeys(keys, record))
            self._list(record, len(keys))
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
            self._unlist(old.record)
            self._records[old.key] = new
            self._list(new, 1)

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
        live = self._live.get(segment)
        blocks = [
            record.nth_block(nth)
            for record in (live.num_of if live is not None else ())
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
        num_of = Counter(self._records.values())
        live = {segment: Counter(live.num_of) for segment, live in self._live.items()}
        assert sum(live.values(), Counter()) == num_of, "a record's live blocks differ"
        for segment, of_segment in live.items():
            assert all(record.segment is segment for record in of_segment), "a record is of another segment"
            assert self._live[segment].num_blocks == of_segment.total() > 0, "a segment's live blocks differ"
        for key, record in self._records.items():
            assert key in record.header.run.keys, "a block lies under another key"

    def _live_share(self, segment: Segment) -> float:
        live = self._live.get(segment)
        return 0.0 if live is None else live.num_blocks * segment.stored_bytes / segment.blocks_bytes

    def _take_out(self, key: BlockKey) -> None:
        self._unlist(self._records.pop(key))
        self._changes[key] = False

    def _list(self, record: Record, num_blocks: int) -> None:
        live = self._live.get(record.segment)
        if live is None:
            live = self._live[record.segment] = _Live()
        live.num_of[record] = live.num_of.get(record, 0) + num_blocks
        live.num_blocks += num_blocks

    def _unlist(self, record: Record) -> None:
        """One block less."""
        live = self._live[record.segment]
        live.num_blocks -= 1
        live.num_of[record] -= 1
        if not live.num_of[record]:
            del live.num_of[record]
            if not live.num_blocks:
                del self._live[record.segment]

    def _is_there(self, block: Placed) -> bool:
        return self._records.get(block.key) is block.record


def _age(record: Record) -> tuple[int, int]:
    return record.segment.number, record.header.first_block
