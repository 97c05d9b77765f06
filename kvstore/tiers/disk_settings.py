"""What an operator decides about a disk tier, and the sizes that follow from it."""

from dataclasses import dataclass

from kvstore.placement import POLICIES
from kvstore.tiers.record import MAX_RECORD_BLOCKS
from kvstore.tiers.seal import KEY_BYTES
from kvstore.tiers.segment_header import SegmentFormat
from kvstore.tiers.segment_layout import SegmentLayout

# The part of the capacity that live blocks may fill: with more, segments are fuller when they are emptied, and
# more is moved for every byte won; with less, disk is wasted.
MAX_LIVE_SHARE = 0.75
# One grows, one is for moving blocks to, one for what files take beside their records.
NUM_FREE_SEGMENTS = 3
MIN_SEGMENTS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskSettings:
    """`namespace` is whatever tells models and layouts apart; `key` (32 bytes) encrypts."""

    block_bytes: int
    capacity_bytes: int
    namespace: bytes
    policy: str = "cost"
    key: bytes | None = None

    def __post_init__(self) -> None:
        if self.block_bytes < 1:
            raise ValueError(f"block_bytes must be at least 1, got {self.block_bytes}")
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if self.key is not None and len(self.key) != KEY_BYTES:
            raise ValueError(f"the key of a disk tier has {KEY_BYTES} bytes, got {len(self.key)}")
        least_bytes = MIN_SEGMENTS * self._layout_for(0).segment_bytes
        if self.capacity_bytes < least_bytes:
            raise ValueError(
                f"a disk tier of blocks of {self.block_bytes} bytes needs at least {least_bytes} bytes,"
                f" got {self.capacity_bytes}"
            )

    @property
    def form(self) -> SegmentFormat:
        return SegmentFormat.of(block_bytes=self.block_bytes, namespace=self.namespace, key=self.key)

    @property
    def layout(self) -> SegmentLayout:
        return self._layout_for(self.capacity_bytes)

    @property
    def max_record_blocks(self) -> int:
        """A segment has room for several records, so that little of it stays empty at its end."""
        return max(1, min(MAX_RECORD_BLOCKS, self.layout.num_blocks // 4))

    @property
    def num_slots(self) -> int:
        """Blocks that are held at most: as many as have room if each has a record of its own."""
        num_segments = self.capacity_bytes // self.layout.segment_bytes
        return int(
            self.layout.num_blocks * min(MAX_LIVE_SHARE * num_segments, num_segments - NUM_FREE_SEGMENTS)
        )

    def _layout_for(self, capacity_bytes: int) -> SegmentLayout:
        return SegmentLayout.of(stored_bytes=self.form.stored_bytes, capacity_bytes=capacity_bytes)
