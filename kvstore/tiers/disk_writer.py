"""How a disk tier is written: runs become records, and room is made for them. Used by one thread at a time."""

import threading
from collections.abc import Collection, Iterator, Sequence

from kvstore.errors import DiskFailed
from kvstore.tiers.disk_index import DiskIndex
from kvstore.tiers.disk_settings import DiskSettings
from kvstore.tiers.placed import Placed, Record, read_blocks, scratch
from kvstore.tiers.record import Block, RecordHeader, block_checksums
from kvstore.tiers.segment import Segment
from kvstore.tiers.segment_files import SegmentFiles
from kvstore.tiers.tier import BlockRun

# A segment that somebody reads gives its space back this late; then another one is emptied.
USERS_TIMEOUT_S = 1.0
# Of a segment that is fuller nothing moves for room: ten bytes would be written to win one.
MAX_MOVED_SHARE = 0.9


class DiskWriter:
    """`changing` guards the index and is never held while waiting for the disk.

    What raises, raises OSError, DiskFailed or TierUnusable.
    """

    def __init__(
        self, *, index: DiskIndex, files: SegmentFiles, settings: DiskSettings, changing: threading.Lock
    ) -> None:
        self.num_stored = 0
        self.num_moved = 0
        self.num_lost = 0
        self._index = index
        self._files = files
        self._block_bytes = settings.block_bytes
        self._layout = settings.layout
        self._spare_bytes = self._layout.moved_bytes(self._layout.segment_bytes - self._layout.blocks_start)
        self._max_record_blocks = settings.max_record_blocks
        self._changing = changing

    def write(self, run: BlockRun, blocks: Sequence[Block], *, now_s: float) -> None:
        """Appends those blocks of the run that are not held."""
        with self._changing:
            missing = self._index.missing(run)
        for first, end in missing:
            for start in range(first, end, self._max_record_blocks):
                stop = min(end, start + self._max_record_blocks)
                if not self._store(run.part(start, stop), blocks[start:stop], now_s=now_s):
                    return  # the run is longer than the tier: what follows could not be reached

    def make_room(self, num_blocks: int) -> None:
        """Until a record of so many blocks fits, beside what moving those of one segment needs."""
        while not self._files.has_room(self._files.growth(num_blocks) + self._spare_bytes):
            if self._files.remove_other():
                continue
            with self._changing:
                segment = self._index.emptiest(self._files.full_segments())
            if segment is None:
                raise DiskFailed(f"no segment can be emptied for {num_blocks} blocks")
            self.empty(segment, max_live_share=MAX_MOVED_SHARE)

    def empty(self, segment: Segment, *, max_live_share: float) -> None:
        """Deletes a segment. Blocks in it that are still wanted move; or leave, where there is no room to move or
        nothing to be won by it."""
        with self._changing:
            live = self._index.live_in(segment)
        has_room = self._files.has_room(self._layout.moved_bytes(segment.blocks_bytes))
        if has_room and len(live) * segment.stored_bytes <= max_live_share * segment.blocks_bytes:
            for start, stop in _records(live, self._max_record_blocks):
                self._move(live[start:stop])
        with self._changing:
            self._index.evict(self._index.live_in(segment))
        self._files.retire(segment)
        self._files.wait_for_users(USERS_TIMEOUT_S)

    def erase(self, segments: Collection[Segment]) -> None:
        """Deletes the segments that are still there, for what was dropped of them."""
        self._files.stop_growing()
        for segment in segments:
            if segment in self._files.segments:
                self.empty(segment, max_live_share=1.0)

    def _store(self, run: BlockRun, blocks: Sequence[Block], *, now_s: float) -> bool:
        """Whether there were slots for all of them."""
        with self._changing:
            slots = self._index.reserve(run, now_s=now_s)
        if not slots:
            return False
        try:
            self.make_room(len(slots))
            record = self._append(run.part(0, len(slots)), blocks[: len(slots)], used_s=now_s)
        except BaseException:
            with self._changing:
                self._index.free(slots)
            raise
        with self._changing:
            self._index.put(slots, record, now_s=now_s)
        self.num_stored += len(slots)
        return len(slots) == len(blocks)

    def _append(self, run: BlockRun, blocks: Sequence[Block], *, used_s: float) -> Record:
        segment = self._files.growing(len(blocks))
        if segment.seal is None:
            stored = list(blocks)
        else:
            stored = scratch(len(blocks), segment.stored_bytes)
            for index, (key, block) in enumerate(zip(run.keys, blocks, strict=True)):
                segment.seal.seal(
                    block.data, key=key, position=run.first_position + index, into=stored[index].data
                )
        checksums = block_checksums(run.keys, stored)
        first_block = segment.next_block(len(stored))
        header = RecordHeader(run=run, first_block=first_block, used_s=used_s, checksums=checksums)
        self._files.append(segment, header, stored)
        return Record(segment, header)

    def _move(self, live: Sequence[Placed]) -> None:
        """Blocks of one record that follow each other. Those that are not what was written are lost, and what is behind
        one that cannot be read is left where it is."""
        parts = [live]
        while parts:
            part = parts.pop()
            blocks = scratch(len(part), self._block_bytes)
            found = read_blocks(part, blocks)
            if found.num_blocks:
                self._move_read(part[: found.num_blocks], blocks)
            if found.lost:
                with self._changing:
                    self.num_lost += self._index.forget(found.lost)
            if found.lost and found.did_come:
                left = [block for block in part[found.num_blocks :] if block not in found.lost]
                parts += reversed(
                    [left[start:stop] for start, stop in _records(left, self._max_record_blocks)]
                )

    def _move_read(self, live: Sequence[Placed], blocks: Sequence[Block]) -> None:
        with self._changing:
            used_s = self._index.last_used_s(live)
        run = live[0].run.part(live[0].nth, live[0].nth + len(live))
        record = self._append(run, blocks[: len(live)], used_s=used_s)
        for block in live:
            with self._changing:
                self._index.move(block, record)
        self.num_moved += len(live)


def _records(live: Sequence[Placed], max_blocks: int) -> Iterator[tuple[int, int]]:
    """The (start, stop) of blocks that were written together, follow each other, and become one record again."""
    start = 0
    for stop in range(1, len(live) + 1):
        if (
            stop == len(live)
            or live[stop].record is not live[start].record
            or live[stop].nth != live[stop - 1].nth + 1
            or stop - start == max_blocks
        ):
            yield start, stop
            start = stop
