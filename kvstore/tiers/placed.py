"""Where one block lies, and how consecutive ones are read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvstore.blocks import BlockKey
from kvstore.errors import DiskFailed
from kvstore.tiers.record import Block, RecordHeader, block_checksums
from kvstore.tiers.seal import BlockSeal
from kvstore.tiers.segment import Segment
from kvstore.tiers.tier import BlockRun

# One read spans what lies between two blocks (the end of a page, or a block that is not wanted) rather than being two.
MAX_GAP_BYTES = 4096
# What one read brings is checked while it is in the processor's cache.
MAX_EXTENT_BYTES = 4 * 2**20
# preadv takes 1024 buffers.
MAX_EXTENT_BLOCKS = 500


@dataclass(frozen=True, eq=False, slots=True)
class Record:
    """One that lies in a segment. It says of each of its blocks where that is: an index refers to it from all of them,
    as an object for each block would be one more to make and for the garbage collector to look at."""

    segment: Segment
    header: RecordHeader

    def block(self, key: BlockKey, *, after: "Placed | None" = None) -> "Placed":
        """One of its blocks, which is looked for behind another one first."""
        keys = self.header.run.keys
        if after is not None and after.record is self and keys[after.nth + 1 : after.nth + 2] == (key,):
            return self.nth_block(after.nth + 1)
        return self.nth_block(keys.index(key))

    def nth_block(self, nth: int) -> "Placed":
        offset = self.header.first_block + nth * self.segment.stored_bytes
        return Placed(self, nth, offset, self.header.checksums[nth])


class Placed(NamedTuple):
    """A block in a segment: number `nth` of its record."""

    record: Record
    nth: int
    offset: int
    checksum: int

    @property
    def segment(self) -> Segment:
        return self.record.segment

    @property
    def run(self) -> BlockRun:
        return self.record.header.run

    @property
    def key(self) -> BlockKey:
        return self.run.keys[self.nth]

    @property
    def position(self) -> int:
        return self.run.first_position + self.nth


class ReadBlocks(NamedTuple):
    """So many leading blocks are there and right; `failure` says what is wrong with the next one, if it is.

    `lost` are that one and, as damage comes in runs, whatever else of the same read is not what was written. It
    `did_come` unless the disk did not give the bytes, and should not be asked for what is behind.
    """

    num_blocks: int
    failure: DiskFailed | None
    lost: Sequence[Placed]
    did_come: bool = True


def read_blocks(placed: Sequence[Placed], into: Sequence[Block]) -> ReadBlocks:
    """Fills one buffer (block_bytes) per block with what was written."""
    num_read = 0
    for start, stop in extents(placed):
        found = _read_extent(placed[start:stop], into[start:stop])
        num_read += found.num_blocks
        if found.failure is not None:
            return found._replace(num_blocks=num_read)
    return ReadBlocks(num_read, None, ())


def extents(placed: Sequence[Placed]) -> Iterator[tuple[int, int]]:
    """The (start, stop) of blocks that one read brings."""
    start = 0
    for stop in range(1, len(placed) + 1):
        if stop == len(placed) or not _is_continued(placed, start, stop):
            yield start, stop
            start = stop


def _is_continued(placed: Sequence[Placed], start: int, at: int) -> bool:
    first, last, block = placed[start], placed[at - 1], placed[at]
    stored_bytes = first.segment.stored_bytes
    return (
        block.segment is last.segment
        and 0 <= block.offset - last.offset - stored_bytes <= MAX_GAP_BYTES
        and block.offset + stored_bytes - first.offset <= MAX_EXTENT_BYTES
        and at - start < MAX_EXTENT_BLOCKS
    )


def _read_extent(extent: Sequence[Placed], into: Sequence[Block]) -> ReadBlocks:
    try:
        return _read_at_once(extent, into)
    except DiskFailed:
        # The file may end within the extent, or one page of it be unreadable: up to there it is read, but a disk that
        # fails is not asked for what is behind.
        return _read_singly(extent, into)


def _read_singly(extent: Sequence[Placed], into: Sequence[Block]) -> ReadBlocks:
    for index, (block, target) in enumerate(zip(extent, into, strict=True)):
        try:
            found = _read_at_once([block], [target])
        except DiskFailed as error:
            return ReadBlocks(index, error, [block], did_come=False)
        if found.failure is not None:
            return found._replace(num_blocks=index)
    return ReadBlocks(len(extent), None, ())


def _read_at_once(extent: Sequence[Placed], into: Sequence[Block]) -> ReadBlocks:
    """Raises DiskFailed if the bytes do not come; that they are others than were written is in the result."""
    segment = extent[0].segment
    stored = into if segment.seal is None else scratch(len(extent), segment.stored_bytes)
    segment.read(extent[0].offset, _with_gaps(extent, stored))
    failures = _unsealed(extent, stored, into, segment.seal) if segment.seal is not None else {}
    failures |= _damaged(extent, stored)
    num_right = min(failures, default=len(extent))
    return ReadBlocks(num_right, failures.get(num_right), [extent[index] for index in failures])


def _damaged(extent: Sequence[Placed], stored: Sequence[Block]) -> dict[int, DiskFailed]:
    checksums = block_checksums([block.key for block in extent], stored)
    return {
        index: DiskFailed(
            f"block {block.key.hex()} in {block.segment.path} at {block.offset}:"
            f" checksum {checksum:#x}, must be {block.checksum:#x}"
        )
        for index, (block, checksum) in enumerate(zip(extent, checksums, strict=True))
        if checksum != block.checksum
    }


def _unsealed(
    extent: Sequence[Placed], stored: Sequence[Block], into: Sequence[Block], seal: BlockSeal
) -> dict[int, DiskFailed]:
    failures: dict[int, DiskFailed] = {}
    for index, block in enumerate(extent):
        try:
            seal.open(stored[index].data, key=block.key, position=block.position, into=into[index].data)
        except DiskFailed as error:
            failures[index] = error
    return failures


def _with_gaps(placed: Sequence[Placed], stored: Sequence[Block]) -> list[Block]:
    buffers = [stored[0]]
    for index in range(1, len(placed)):
        gap_bytes = placed[index].offset - placed[index - 1].offset - len(stored[index - 1])
        if gap_bytes:
            buffers.append(np.empty(gap_bytes, np.uint8))
        buffers.append(stored[index])
    return buffers


def scratch(num_blocks: int, size_bytes: int) -> list[Block]:
    """Buffers for so many blocks."""
    return list(np.empty((num_blocks, size_bytes), np.uint8))
