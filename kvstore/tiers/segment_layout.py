"""How large segments are, and where in them what lies.

    segment header | headers of records, one behind the other | blocks, one behind the other
    0              112                                        blocks_start

Headers lie apart so that blocks lie at whole pages of the page cache, and a start reads the headers of a segment at
once. With each header in a page before its blocks, every record would write and read one page more.
"""

from dataclasses import dataclass

from kvstore.tiers.record import header_bytes
from kvstore.tiers.segment_header import SEGMENT_HEADER_BYTES

# So many segments make up a tier, until they would be larger than the second figure.
SEGMENTS_PER_TIER = 16
LARGEST_SEGMENT_BYTES = 256 * 2**20
# No more files than this are open, however large the tier.
MAX_SEGMENTS = 256
# Files occupy whole pages of the file system.
PAGE_BYTES = 4096
# The page cache works in larger units where it can; blocks that are made of such begin at one.
LARGE_PAGE_BYTES = 16 * PAGE_BYTES
# Records from here on begin at a page: 1 MiB was written and read 1.3 times as fast so (1950 and 1488 MB/s, virtual
# NVMe disk), and the gap is small beside them.
ALIGNED_FROM_BYTES = 64 * PAGE_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentLayout:
    """Of the segments of one tier: how far they grow, and where their blocks begin if nothing else was written."""

    stored_bytes: int
    segment_bytes: int
    blocks_start: int

    @classmethod
    def of(cls, *, stored_bytes: int, capacity_bytes: int) -> "SegmentLayout":
        largest = max(LARGEST_SEGMENT_BYTES, capacity_bytes // MAX_SEGMENTS)
        wanted = rounded_down(min(capacity_bytes // SEGMENTS_PER_TIER, largest), PAGE_BYTES)
        smallest = _blocks_start(1, stored_bytes) + occupied_bytes(stored_bytes)
        segment_bytes = max(smallest, wanted)
        # A header for every block has room, however short the records are.
        left_bytes = segment_bytes - SEGMENT_HEADER_BYTES - _unit_bytes(stored_bytes)
        num_headers = max(1, left_bytes // (stored_bytes + header_bytes(1)))
        return cls(
            stored_bytes=stored_bytes,
            segment_bytes=segment_bytes,
            blocks_start=_blocks_start(num_headers, stored_bytes),
        )

    @property
    def num_blocks(self) -> int:
        """Those that a segment has room for, if each has a record of its own."""
        taken_bytes = self.record_start(self.stored_bytes, 1)
        num_headers = (self.blocks_start - SEGMENT_HEADER_BYTES) // header_bytes(1)
        return min(num_headers, (self.segment_bytes - self.blocks_start) // taken_bytes)

    def record_start(self, end: int, num_blocks: int) -> int:
        """Where the blocks of a record begin if those before end there."""
        return occupied_bytes(end) if num_blocks * self.stored_bytes >= ALIGNED_FROM_BYTES else end

    def max_record_bytes(self, num_blocks: int) -> int:
        """What the blocks of a record take at most, wherever the ones before end."""
        return self.record_start(1, num_blocks) - 1 + num_blocks * self.stored_bytes

    def moved_bytes(self, num_bytes: int) -> int:
        """What so many bytes of blocks take from the disk at most when they move: every large record may be aligned
        anew, and the files that they begin have headers and ends of their own."""
        are_pages = self.stored_bytes % PAGE_BYTES == 0
        taken_bytes = num_bytes + (0 if are_pages else num_bytes // (ALIGNED_FROM_BYTES // PAGE_BYTES))
        num_begun = -(-taken_bytes // (self.segment_bytes - self.blocks_start))
        return taken_bytes + num_begun * (self.blocks_start + PAGE_BYTES) + PAGE_BYTES


def occupied_bytes(size_bytes: int) -> int:
    """What a file of this size takes from the disk."""
    return rounded_down(size_bytes + PAGE_BYTES - 1, PAGE_BYTES)


def rounded_down(num_bytes: int, unit_bytes: int) -> int:
    return num_bytes // unit_bytes * unit_bytes


def _unit_bytes(stored_bytes: int) -> int:
    return PAGE_BYTES if stored_bytes % LARGE_PAGE_BYTES else LARGE_PAGE_BYTES


def _blocks_start(num_headers: int, stored_bytes: int) -> int:
    unit_bytes = _unit_bytes(stored_bytes)
    return rounded_down(SEGMENT_HEADER_BYTES + num_headers * header_bytes(1) + unit_bytes - 1, unit_bytes)
