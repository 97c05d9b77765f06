import struct
from dataclasses import replace

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codec.format import (
    MAX_CHUNK_BYTES,
    Chunk,
    ChunkHeader,
    Section,
    pack_chunk,
    unpack_chunk,
)
from kvstore.errors import CodecCorrupted, ProfileMismatch
from kvstore.layout import KvLayout

LAYOUT = KvLayout(num_layers=4, num_kv_heads=2, head_dim=32, dtype="bfloat16")
PROFILE = bytes(range(16))
HEADER = ChunkHeader(level=2, num_blocks=3, layout=LAYOUT, profile_id=PROFILE)
SECTIONS = {Section.ANCHORS: b"anchors", Section.SCALES: b"", Section.DELTAS: b"the deltas"}
HEADER_BYTES = 44


def unpack(
    data: bytes, *, layout: KvLayout = LAYOUT, num_blocks: int = 3, profile_id: bytes = PROFILE
) -> Chunk:
    return unpack_chunk(data, layout=layout, num_blocks=num_blocks, profile_id=profile_id)


def sealed(body: bytes) -> bytes:
    """What a peer that lies, but knows how to, would send."""
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


@given(
    level=st.integers(0, 255),
    num_blocks=st.integers(1, 2**32 - 1),
    has_profile=st.booleans(),
    sections=st.dictionaries(st.sampled_from(Section), st.binary(max_size=50)),
)
@settings(max_examples=100, deadline=None)
def test_what_was_packed_is_unpacked(
    level: int, num_blocks: int, has_profile: bool, sections: dict[Section, bytes]
) -> None:
    header = ChunkHeader(
        level=level, num_blocks=num_blocks, layout=LAYOUT, profile_id=PROFILE if has_profile else b""
    )
    chunk = unpack(pack_chunk(header, sections), num_blocks=num_blocks)
    assert chunk.header == header
    assert {kind: bytes(chunk.section(kind)) for kind in chunk.sections} == sections


def test_the_bytes_of_a_chunk_are_pinned() -> None:
    """A change of these bytes is a new version of the format."""
    body = (
        b"PNKV" + bytes([1, 2, 2, 3])
        + struct.pack("<5I", 3, 16, 4, 2, 32)
        + PROFILE
        + struct.pack("<6I", 2, 0, 5, 7, 6, 10)
        + b"anchorsthe deltas"
    )  # fmt: skip
    assert pack_chunk(HEADER, SECTIONS) == sealed(body)


@given(data=st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_chunk_or_corrupted(data: bytes) -> None:
    packed = pack_chunk(HEADER, SECTIONS)
    for wrong in (data, packed[:HEADER_BYTES] + data, sealed(packed[:HEADER_BYTES] + data)):
        with pytest.raises(CodecCorrupted):
            unpack(wrong)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_changed_cut_or_longer_chunk_is_corrupted(data: st.DataObject) -> None:
    packed = pack_chunk(HEADER, SECTIONS)
    changed = bytearray(packed)
    changed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    cut = packed[: data.draw(st.integers(0, len(packed) - 1))]
    for wrong in (bytes(changed), cut, packed + b"\0"):
        with pytest.raises(CodecCorrupted):
            unpack(wrong)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_liar_that_seals_its_changes_gets_a_chunk_or_a_typed_error(data: st.DataObject) -> None:
    body = bytearray(pack_chunk(HEADER, SECTIONS)[:-8])
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        chunk = unpack(sealed(bytes(body)))
    except (CodecCorrupted, ProfileMismatch):
        return
    assert chunk.header.layout == LAYOUT
    assert sum(len(section) for section in chunk.sections.values()) == 17


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (struct.pack("<6I", 2, 2**32 - 1, 5, 7, 6, 10), "4294967295 bytes, 17 are left"),
        (struct.pack("<6I", 2, 0, 5, 7, 6, 9), "1 bytes after the last section"),
        (struct.pack("<6I", 2, 0, 6, 7, 5, 10), "section 5 after 6"),
        (struct.pack("<6I", 5, 0, 5, 7, 6, 10), "section 5 after 5"),
        (struct.pack("<6I", 2, 0, 5, 7, 99, 10), "section 99"),
    ],
)
def test_sections_that_do_not_fit_are_refused(index: bytes, message: str) -> None:
    body = pack_chunk(HEADER, SECTIONS)[:-8]
    with pytest.raises(CodecCorrupted, match=message):
        unpack(sealed(body[:HEADER_BYTES] + index + body[HEADER_BYTES + len(index) :]))


def test_more_sections_than_bytes_are_refused() -> None:
    body = bytearray(pack_chunk(HEADER, {})[:-8])
    body[7] = 255
    with pytest.raises(CodecCorrupted, match="cannot list 255 sections"):
        unpack(sealed(bytes(body)))


def test_another_version_is_named() -> None:
    body = bytearray(pack_chunk(HEADER, SECTIONS)[:-8])
    body[4] = 2
    with pytest.raises(CodecCorrupted, match="chunk version 2, this worker reads 1"):
        unpack(sealed(bytes(body)))


def test_a_chunk_of_another_layout_is_refused() -> None:
    packed = pack_chunk(HEADER, SECTIONS)
    for layout in (
        replace(LAYOUT, dtype="float32"),
        replace(LAYOUT, num_layers=5),
        replace(LAYOUT, num_kv_heads=32, head_dim=2),
        replace(LAYOUT, block_size_tokens=32),
    ):
        with pytest.raises(CodecCorrupted, match="dtype, blocks, tokens, layers, heads, dim"):
            unpack(packed, layout=layout)
    with pytest.raises(CodecCorrupted):
        unpack(packed, num_blocks=2)


def test_a_chunk_of_another_profile_is_refused_and_one_without_is_welcome() -> None:
    packed = pack_chunk(HEADER, SECTIONS)
    for ours in (b"", bytes(range(1, 17))):
        with pytest.raises(ProfileMismatch, match=PROFILE.hex()):
            unpack(packed, profile_id=ours)
    plain = pack_chunk(replace(HEADER, profile_id=b""), SECTIONS)
    assert unpack(plain).header.profile_id == b""


def test_a_section_that_is_not_there_is_corrupted() -> None:
    with pytest.raises(CodecCorrupted, match="level 2 without its section VALUES"):
        unpack(pack_chunk(HEADER, SECTIONS)).section(Section.VALUES)


def test_what_does_not_fit_a_chunk_is_not_packed() -> None:
    with pytest.raises(ValueError, match="allowed are"):
        pack_chunk(HEADER, {Section.VALUES: bytes(MAX_CHUNK_BYTES)})
    with pytest.raises(ValueError, match="level in 0"):
        replace(HEADER, level=256)
    with pytest.raises(ValueError, match="16 bytes"):
        replace(HEADER, profile_id=b"short")
