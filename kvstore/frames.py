"""The format of one frame on the data plane: a fixed header, then the payload it announces.

    offset  size  field
    0       4     magic b"PNSK"
    4       1     version
    5       1     kind (FrameKind)
    6       2     flags, 0 in this version
    8       4     layer          of BLOCKS; the codec's level of WANT and CHUNK; else 0
    12      4     first_block    of BLOCKS, WANT and CHUNK, else 0
    16      4     num_blocks     of BLOCKS, WANT and CHUNK, else 0
    20      4     payload_bytes  at most `max_payload_bytes` of the kind
    24      8     checksum: XXH3-64 of the payload, seeded with the XXH3-64 of bytes 0..23

All integers are little-endian. One checksum covers header and payload. On one AVX-512 core XXH3 reads
50 GB/s, zlib.crc32 4.3 and zlib.adler32 3.7: either of those would halve the plane's throughput.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

import xxhash

from kvstore.errors import TransferCorrupted

MAGIC = b"PNSK"
VERSION = 1
MAX_PAYLOAD_BYTES = 4 * 2**20
# A chunk is sixteen blocks or so in all layers: 2 MiB each for a model of 8 billion parameters.
MAX_CHUNK_BYTES = 64 * 2**20

_FIELDS = struct.Struct("<4sBBHIIII")
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size


class FrameKind(IntEnum):
    TICKET = 1  # puller to source, the first frame: which transfer this connection is for
    BLOCKS = 2  # one layer of a run of blocks
    STATE = 3  # the last frame: everything of the request that is not KV
    KEEP_ALIVE = 4  # the source lives but has nothing to send yet
    REFUSAL = 5  # the source gives up; the payload is the reason in UTF-8
    WANT = 6  # puller to source: blocks by their place in the chain, to be sent at this level; no payload
    CHUNK = 7  # what a WANT asked for, in all layers


_KINDS = {kind.value: kind for kind in FrameKind}


def max_payload_bytes(kind: FrameKind) -> int:
    """What a frame of this kind may announce."""
    return MAX_CHUNK_BYTES if kind is FrameKind.CHUNK else MAX_PAYLOAD_BYTES


class FrameHeader(NamedTuple):
    """What a frame says of itself, but for the checksum."""

    kind: FrameKind
    layer: int = 0  # or level
    first_block: int = 0
    num_blocks: int = 0
    payload_bytes: int = 0


def pack_header(header: FrameHeader, *, payload: memoryview, into: memoryview) -> None:
    """Writes the HEADER_BYTES of a frame that carries `payload` to `into`."""
    allowed_bytes = max_payload_bytes(header.kind)
    if len(payload) != header.payload_bytes or len(payload) > allowed_bytes:
        raise ValueError(
            f"payload is {len(payload)} bytes, announced {header.payload_bytes}, allowed {allowed_bytes}"
        )
    _FIELDS.pack_into(into, 0, MAGIC, VERSION, header.kind, 0, *header[1:])
    _CHECKSUM.pack_into(into, _FIELDS.size, _digest(into[: _FIELDS.size], payload))


def unpack_header(data: memoryview) -> FrameHeader:
    """Reads HEADER_BYTES; `verify` comes when the payload is there.

    Raises TransferCorrupted for what this version would not have written.
    """
    magic, version, kind, flags, layer, first_block, num_blocks, payload_bytes = _FIELDS.unpack_from(data)
    if magic != MAGIC:
        raise TransferCorrupted(f"not a frame: starts with {magic!r}, must be {MAGIC!r}")
    if version != VERSION:
        raise TransferCorrupted(f"frame version {version}, this worker speaks {VERSION}")
    if kind not in _KINDS:
        raise TransferCorrupted(f"unknown frame kind {kind}")
    if flags != 0:
        raise TransferCorrupted(f"frame flags {flags:#x}, must be 0 in version {VERSION}")
    if payload_bytes > max_payload_bytes(_KINDS[kind]):
        raise TransferCorrupted(
            f"{_KINDS[kind].name} frame announces {payload_bytes} bytes, "
            f"allowed are {max_payload_bytes(_KINDS[kind])}"
        )
    return FrameHeader(_KINDS[kind], layer, first_block, num_blocks, payload_bytes)


def verify(header: memoryview, payload: memoryview) -> None:
    """Raises TransferCorrupted unless the HEADER_BYTES and the payload arrived as they were sent."""
    (announced,) = _CHECKSUM.unpack_from(header, _FIELDS.size)
    found = _digest(header[: _FIELDS.size], payload)
    if found != announced:
        raise TransferCorrupted(f"checksum of a frame is {found:#x}, announced {announced:#x}")


def _digest(fields: memoryview, payload: memoryview) -> int:
    return xxhash.xxh3_64_intdigest(payload, seed=xxhash.xxh3_64_intdigest(fields))
