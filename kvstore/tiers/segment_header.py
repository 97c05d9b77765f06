"""What a segment file begins with: whose it is, and the seed of its checksums.

offset  size  field
0       8     magic b"PNSKSEGM"
8       4     version; up to here every version agrees
12      4     flags: 1, blocks are sealed
16      8     number of the segment; later ones are higher
24      8     block_bytes, before sealing
32      16    namespace: BLAKE2b of what the blocks belong to (model and layout)
48      16    salt, random
64      28    key check of a sealed segment, else zeros
92      4     zeros
96      8     blocks_start: up to there lie the headers of records, from there on blocks
104     8     XXH3-64 of all that, which is the seed of the segment's records
"""

import os
import struct
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b

import xxhash

from kvstore.errors import TierUnusable
from kvstore.tiers.seal import KEY_CHECK_BYTES, SALT_BYTES, SEAL_BYTES, BlockSeal

MAGIC = b"PNSKSEGM"
VERSION = 2
NAMESPACE_BYTES = 16

_START = struct.Struct("<8sI")
_FIELDS = struct.Struct(f"<8sIIQQ{NAMESPACE_BYTES}s{SALT_BYTES}s{KEY_CHECK_BYTES}s4xQ")
_CHECKSUM = struct.Struct("<Q")
_SEALED = 1
SEGMENT_HEADER_BYTES = _FIELDS.size + _CHECKSUM.size


class Origin(Enum):
    """What a segment that is not ours is."""

    FOREIGN = "of another model or layout"
    UNSEALED = "not encrypted, although a key was given"
    OTHER_VERSION = "of another version of the format"
    CORRUPTED = "no segment, or one with a corrupted header"


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentFormat:
    """What all segments of one tier share."""

    block_bytes: int
    namespace: bytes
    key: bytes | None

    @classmethod
    def of(cls, *, block_bytes: int, namespace: bytes, key: bytes | None) -> "SegmentFormat":
        """`namespace`: whatever tells models and layouts apart."""
        digest = blake2b(namespace, digest_size=NAMESPACE_BYTES, person=b"penstock-disk").digest()
        return cls(block_bytes=block_bytes, namespace=digest, key=key)

    @property
    def stored_bytes(self) -> int:
        """Of one block."""
        return self.block_bytes + (SEAL_BYTES if self.key is not None else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentHeader:
    number: int
    blocks_start: int
    seed: int
    seal: BlockSeal | None


def new_segment_header(number: int, form: SegmentFormat, *, blocks_start: int) -> tuple[bytes, SegmentHeader]:
    """The bytes of a new segment's header, and what they say."""
    salt = os.urandom(SALT_BYTES)
    seal = None if form.key is None else BlockSeal(form.key, salt=salt, namespace=form.namespace)
    flags, key_check = (0, bytes(KEY_CHECK_BYTES)) if seal is None else (_SEALED, seal.key_check())
    data = _FIELDS.pack(
        MAGIC, VERSION, flags, number, form.block_bytes, form.namespace, salt, key_check, blocks_start
    )  # fmt: skip
    seed = xxhash.xxh3_64_intdigest(data)
    header = SegmentHeader(number=number, blocks_start=blocks_start, seed=seed, seal=seal)
    return data + _CHECKSUM.pack(seed), header


def read_segment_header(data: bytes, form: SegmentFormat) -> SegmentHeader | Origin:
    """Raises TierUnusable if the segment is ours but sealed with another key than we have."""
    if len(data) < SEGMENT_HEADER_BYTES:
        return Origin.CORRUPTED
    magic, version = _START.unpack_from(data)
    if magic != MAGIC:
        return Origin.CORRUPTED
    if version != VERSION:
        return Origin.OTHER_VERSION
    _, _, flags, number, block_bytes, namespace, salt, key_check, blocks_start = _FIELDS.unpack_from(data)
    (seed,) = _CHECKSUM.unpack_from(data, _FIELDS.size)
    if seed != xxhash.xxh3_64_intdigest(data[: _FIELDS.size]):
        return Origin.CORRUPTED
    if form.key is not None and not flags & _SEALED:
        return Origin.UNSEALED
    if (namespace, block_bytes) != (form.namespace, form.block_bytes):
        return Origin.FOREIGN
    seal = _opened_seal(form, salt, key_check) if flags & _SEALED else None
    return SegmentHeader(number=number, blocks_start=blocks_start, seed=seed, seal=seal)


def _opened_seal(form: SegmentFormat, salt: bytes, key_check: bytes) -> BlockSeal:
    if form.key is None:
        raise TierUnusable("the blocks on disk are encrypted, but the disk tier was given no key")
    seal = BlockSeal(form.key, salt=salt, namespace=form.namespace)
    if not seal.is_key_of(key_check):
        raise TierUnusable("the blocks on disk were encrypted with another key than the disk tier was given")
    return seal
