import struct

import numpy as np
import pytest
import zstandard

from kvstore.codec.codec import KvCodec
from kvstore.codec.format import Section, pack_chunk, unpack_chunk
from kvstore.errors import CodecCorrupted
from kvstore.layout import KvLayout

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32")


@pytest.mark.parametrize("announced_bytes", [2**45, 2**33, 1, 0])
def test_scales_that_announce_another_size_are_refused_before_they_take_memory(announced_bytes: int) -> None:
    codec = KvCodec(LAYOUT, profile=None)
    values = np.random.default_rng(0).normal(size=(2, LAYOUT.block_bytes // 4)).astype(np.float32)
    data = codec.encode(values.view(np.uint8), [0, 1], level=1)
    chunk = unpack_chunk(data, layout=LAYOUT, num_blocks=2, profile_id=b"")
    zstd_frame = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", announced_bytes) + b"\x01\x00\x00"
    honest = {kind: bytes(section) for kind, section in chunk.sections.items()}
    lie = pack_chunk(chunk.header, honest | {Section.SCALES: zstd_frame})

    room = np.zeros((2, LAYOUT.block_bytes), np.uint8)
    with pytest.raises(CodecCorrupted, match="scales"):
        codec.decode(lie, room, [0, 1])
    assert not room.any()


@pytest.mark.parametrize("level", [1, 4, 5, 6])
def test_scales_that_are_not_finite_are_refused(level: int) -> None:
    codec = KvCodec(LAYOUT, profile=None)
    values = np.random.default_rng(0).normal(size=(2, LAYOUT.block_bytes // 4)).astype(np.float32)
    data = codec.encode(values.view(np.uint8), [0, 1], level=level)
    chunk = unpack_chunk(data, layout=LAYOUT, num_blocks=2, profile_id=b"")
    honest = {kind: bytes(section) for kind, section in chunk.sections.items()}
    scales = honest[Section.SCALES] if level > 3 else zstandard.decompress(honest[Section.SCALES])
    infinite = b"\xff" * 4 + scales[4:]
    lie = zstandard.compress(infinite) if level <= 3 else infinite

    room = np.zeros((2, LAYOUT.block_bytes), np.uint8)
    with pytest.raises(CodecCorrupted, match="not finite"):
        codec.decode(pack_chunk(chunk.header, honest | {Section.SCALES: lie}), room, [0, 1])
    assert not room.any()
