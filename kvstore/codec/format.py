"""The container of one coded chunk: what it holds, for which layout and profile, and the bytes of each section.

    offset  size  field
    0       4     magic b"PNKV"
    4       1     version
    5       1     level
    6       1     dtype: 1 float32, 2 bfloat16, 3 int8, 4 fp8
    7       1     num_sections
    8       4     num_blocks
    12      4     block_size_tokens
    16      4     num_layers
    20      4     num_kv_heads
    24      4     head_dim
    28      16    profile digest, zero if the chunk needs no profile
    44      8     per section: kind (4), size in bytes (4); kinds strictly ascending
    ...           the sections, one after the other
    end-8   8     XXH3-64 of everything before it

All integers are little-endian. docs/kv-bitstream.md says what the sections hold.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from kvstore.errors import CodecCorrupted, ProfileMismatch
from kvstore.layout import KvLayout

MAGIC = b"PNKV"
VERSION = 1
MAX_CHUNK_BYTES = 64 * 2**20  # what a frame of the data plane may carry
PROFILE_ID_BYTES = 16

_HEADER = struct.Struct("<4sBBBBIIIII16s")
_SECTION = struct.Struct("<II")
_CHECKSUM = struct.Struct("<Q")
_DTYPES = {"float32": 1, "bfloat16": 2, "int8": 3, "fp8": 4}


class Section(IntEnum):
    VALUES = 1  # KV as it is, or quantised values without entropy coding
    SCALES = 2  # numbers that turn quantised values into KV
    ANCHOR_TABLES = 3
    DELTA_TABLES = 4
    ANCHORS = 5
    DELTAS = 6


_KINDS = {section.value: section for section in Section}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkHeader:
    """`profile_id` is empty if the chunk needs no profile."""

    level: int
    num_blocks: int
    layout: KvLayout
    profile_id: bytes = b""

    def __post_init__(self) -> None:
        if not 0 <= self.level < 256 or not 0 < self.num_blocks < 2**32:
            raise ValueError(
                f"a chunk has a level in 0..255 and blocks, got {self.level} and {self.num_blocks}"
            )
        if len(self.profile_id) not in (0, PROFILE_ID_BYTES):
            raise ValueError(f"a profile's digest has {PROFILE_ID_BYTES} bytes, got {self.profile_id.hex()}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Sections are views of the bytes that were unpacked."""

    header: ChunkHeader
    sections: Mapping[Section, memoryview]

    def section(self, kind: Section) -> memoryview:
        if kind not in self.sections:
            raise CodecCorrupted(f"a chunk of level {self.header.level} without its section {kind.name}")
        return self.sections[kind]


def pack_chunk(header: ChunkHeader, sections: Mapping[Section, bytes]) -> bytes:
    layout = header.layout
    head = _HEADER.pack(
        MAGIC,
        VERSION,
        header.level,
        _DTYPES[layout.dtype],
        len(sections),
        header.num_blocks,
        layout.block_size_tokens,
        layout.num_layers,
        layout.num_kv_heads,
        layout.head_dim,
        header.profile_id,
    )
    kinds = sorted(sections)
    index = [_SECTION.pack(kind, len(sections[kind])) for kind in kinds]
    body = b"".join([head, *index, *(sections[kind] for kind in kinds)])
    if len(body) + _CHECKSUM.size > MAX_CHUNK_BYTES:
        raise ValueError(f"a chunk of {len(body)} bytes, allowed are {MAX_CHUNK_BYTES}")
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def unpack_chunk(
    data: bytes | bytearray | memoryview, *, layout: KvLayout, num_blocks: int, profile_id: bytes
) -> Chunk:
    """Raises CodecCorrupted unless `data` is a whole chunk of that many blocks of that layout.

    Raises ProfileMismatch if it needs another profile than ours, of which `profile_id` is the digest (empty: none).
    """
    view = memoryview(data).cast("B")
    if not _HEADER.size + _CHECKSUM.size <= len(view) <= MAX_CHUNK_BYTES:
        raise CodecCorrupted(
            f"a chunk of {len(view)} bytes, allowed are {_HEADER.size + _CHECKSUM.size} to {MAX_CHUNK_BYTES}"
        )
    magic, version, level, dtype, num_sections, *facts, digest = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise CodecCorrupted(f"not a chunk: starts with {magic!r}, must be {MAGIC!r}")
    if version != VERSION:
        raise CodecCorrupted(f"chunk version {version}, this worker reads {VERSION}")
    body = view[: -_CHECKSUM.size]
    (announced,) = _CHECKSUM.unpack_from(view, len(body))
    found = xxhash.xxh3_64_intdigest(body)
    if found != announced:
        raise CodecCorrupted(f"checksum of a chunk is {found:#x}, announced {announced:#x}")
    ours = _facts(layout, num_blocks)
    if (dtype, *facts) != ours:
        raise CodecCorrupted(
            f"chunk of dtype, blocks, tokens, layers, heads, dim {(dtype, *facts)}, not {ours}"
        )
    needed = b"" if digest == bytes(PROFILE_ID_BYTES) else digest
    if needed and needed != profile_id:
        raise ProfileMismatch(
            f"chunk coded with profile {needed.hex()}, ours is {profile_id.hex() or 'none'}"
        )
    header = ChunkHeader(level=level, num_blocks=num_blocks, layout=layout, profile_id=needed)
    return Chunk(header=header, sections=_split(body, num_sections))


def _facts(layout: KvLayout, num_blocks: int) -> tuple[int, ...]:
    return (
        _DTYPES[layout.dtype],
        num_blocks,
        layout.block_size_tokens,
        layout.num_layers,
        layout.num_kv_heads,
        layout.head_dim,
    )


def _split(body: memoryview, num_sections: int) -> dict[Section, memoryview]:
    start = _HEADER.size + num_sections * _SECTION.size
    if start > len(body):
        raise CodecCorrupted(f"a chunk of {len(body)} bytes cannot list {num_sections} sections")
    sections: dict[Section, memoryview] = {}
    last = 0
    for kind, size in _SECTION.iter_unpack(body[_HEADER.size : start]):
        if kind <= last or kind not in _KINDS:
            raise CodecCorrupted(f"section {kind} after {last}, known are {sorted(_KINDS)} in this order")
        if size > len(body) - start:
            raise CodecCorrupted(f"section {kind} of {size} bytes, {len(body) - start} are left")
        sections[_KINDS[kind]] = body[start : start + size]
        start, last = start + size, kind
    if start != len(body):
        raise CodecCorrupted(f"{len(body) - start} bytes after the last section")
    return sections
