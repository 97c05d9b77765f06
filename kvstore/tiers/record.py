"""The header of one record in a segment: a run of blocks, where they lie, and a checksum for each.

    offset   size  field
    0        4     magic b"PNSR"
    4        4     num_blocks, n
    8        8     first_position
    16       8     first_block: where in the segment the blocks begin, one behind the other
    24       8     used_s: last use of the blocks when they were written, seconds since 1970 (float64)
    32       16    root
    48       16    parent
    64       24 n  of each block: its key, and the XXH3-64 of its bytes as stored, seeded with the key
    64+24 n  8     XXH3-64 of all that, seeded with the segment's seed plus the header's offset

All integers are little-endian. The seeds tie a header to its place and a block to its key: bytes that lie at
another place than they were written to are never taken for what they are not.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.blocks import DIGEST_BYTES, BlockKey
from kvstore.tiers.tier import BlockRun

MAGIC = b"PNSR"
# The header then fits one page, and the blocks one pwritev (at most 1024 buffers).
MAX_RECORD_BLOCKS = 160
# What an index keeps in 32 bits, less the longest record.
MAX_POSITION = 2**32 - 1 - MAX_RECORD_BLOCKS

_FIXED = struct.Struct("<4sIQQd16s16s")
_BLOCK = struct.Struct(f"<{DIGEST_BYTES}sQ")
_KEY = struct.Struct(f"<Q{DIGEST_BYTES - 8}s")  # the seed of the block's checksum, and the rest
_CHECKSUM = struct.Struct("<Q")
_SEED_MASK = 2**64 - 1

# Its bytes, or those as stored. That it is a buffer numpy's types say only under Python 3.12 and later.
Block = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordHeader:
    """`checksums` has one entry per block of the run, of which the first one lies at `first_block`."""

    run: BlockRun
    first_block: int
    used_s: float
    checksums: tuple[int, ...]


def header_bytes(num_blocks: int) -> int:
    return _FIXED.size + num_blocks * _BLOCK.size + _CHECKSUM.size


def block_checksums(keys: Sequence[BlockKey], stored: Sequence[Block]) -> tuple[int, ...]:
    seeds = (seed for seed, _ in _KEY.iter_unpack(b"".join(keys)))
    digests = map(xxhash.xxh3_64_intdigest, stored, seeds)  # type: ignore[arg-type]  # arrays are buffers
    return tuple(digests)


def pack_record_header(header: RecordHeader, *, seed: int) -> bytes:
    """`seed`: the segment's plus the offset where the header will lie."""
    run = header.run
    fixed = _FIXED.pack(
        MAGIC, len(run.keys), run.first_position, header.first_block, header.used_s, run.root, run.parent
    )
    data = b"".join((fixed, *starmap(_BLOCK.pack, zip(run.keys, header.checksums, strict=True))))
    return data + _CHECKSUM.pack(_digest(data, seed))


def _told_header_bytes(data: bytes) -> int | None:
    """How long the header is that `data` seems to begin with; None if that is none."""
    if len(data) < _FIXED.size:
        return None
    magic, num_blocks, first_position, _, used_s, _, _ = _FIXED.unpack_from(data)
    is_possible = (
        magic == MAGIC
        and 0 < num_blocks <= MAX_RECORD_BLOCKS
        and first_position <= MAX_POSITION
        and 0 <= used_s < math.inf
    )
    return header_bytes(num_blocks) if is_possible else None


def unpack_record_header(data: bytes, *, seed: int) -> RecordHeader | None:
    """The header that `data` begins with; None if those bytes are no header written at this place."""
    size_bytes = _told_header_bytes(data)
    if size_bytes is None or len(data) < size_bytes:
        return None
    _, num_blocks, first_position, first_block, used_s, root, parent = _FIXED.unpack_from(data)
    blocks_end = _FIXED.size + num_blocks * _BLOCK.size
    (checksum,) = _CHECKSUM.unpack_from(data, blocks_end)
    if checksum != _digest(data[:blocks_end], seed):
        return None
    keys, checksums = zip(*_BLOCK.iter_unpack(data[_FIXED.size : blocks_end]), strict=True)
    run = BlockRun(root=root, parent=parent, first_position=first_position, keys=keys)
    return RecordHeader(run=run, first_block=first_block, used_s=used_s, checksums=checksums)


def _digest(data: bytes, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(data, seed=seed & _SEED_MASK)
