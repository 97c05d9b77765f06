import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import TransferCorrupted
from kvstore.frames import (
    HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    FrameHeader,
    FrameKind,
    max_payload_bytes,
    pack_header,
    unpack_header,
    verify,
)

U32 = st.integers(0, 2**32 - 1)


def packed(header: FrameHeader, payload: bytes) -> bytearray:
    data = bytearray(HEADER_BYTES)
    pack_header(header, payload=memoryview(payload), into=memoryview(data))
    return data


def check(frame: memoryview) -> None:
    unpack_header(frame[:HEADER_BYTES])
    verify(frame[:HEADER_BYTES], frame[HEADER_BYTES:])


def blocks(payload: bytes) -> FrameHeader:
    return FrameHeader(
        kind=FrameKind.BLOCKS, layer=3, first_block=7, num_blocks=2, payload_bytes=len(payload)
    )


@given(
    kind=st.sampled_from(FrameKind),
    layer=U32,
    first_block=U32,
    num_blocks=U32,
    payload=st.binary(max_size=99),
)
def test_a_header_comes_back_as_it_was_written(
    kind: FrameKind, layer: int, first_block: int, num_blocks: int, payload: bytes
) -> None:
    header = FrameHeader(
        kind=kind, layer=layer, first_block=first_block, num_blocks=num_blocks, payload_bytes=len(payload)
    )

    data = memoryview(packed(header, payload))

    assert unpack_header(data) == header
    verify(data, memoryview(payload))


@given(data=st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_random_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(TransferCorrupted):
        unpack_header(memoryview(data))


@given(tail=st.binary(min_size=HEADER_BYTES - 6, max_size=HEADER_BYTES - 6), kind=st.integers(0, 255))
def test_what_begins_like_a_header_is_bounded_or_refused(tail: bytes, kind: int) -> None:
    try:
        header = unpack_header(memoryview(b"PNSK\x01" + bytes([kind]) + tail))
    except TransferCorrupted:
        return
    assert header.payload_bytes <= max_payload_bytes(header.kind)


@given(position=st.integers(0, (HEADER_BYTES + 64) * 8 - 1))
def test_every_flipped_bit_is_found(position: int) -> None:
    payload = bytearray(range(64))
    frame = packed(blocks(bytes(payload)), bytes(payload)) + payload
    frame[position // 8] ^= 1 << position % 8

    with pytest.raises(TransferCorrupted):
        check(memoryview(frame))


def test_another_version_is_named_in_the_error() -> None:
    data = packed(blocks(b""), b"")
    data[4] = 9
    with pytest.raises(TransferCorrupted, match="version 9, this worker speaks 1"):
        unpack_header(memoryview(data))


def test_a_payload_that_is_not_as_announced_is_not_packed() -> None:
    with pytest.raises(ValueError, match="5 bytes, announced 4"):
        pack_header(blocks(b"1234"), payload=memoryview(b"12345"), into=memoryview(bytearray(HEADER_BYTES)))


def test_a_payload_beyond_the_bound_is_not_packed() -> None:
    payload = bytes(MAX_PAYLOAD_BYTES + 1)
    with pytest.raises(ValueError, match="allowed"):
        packed(blocks(payload), payload)


def test_only_chunks_may_be_large() -> None:
    assert {kind for kind in FrameKind if max_payload_bytes(kind) > MAX_PAYLOAD_BYTES} == {FrameKind.CHUNK}
    large = memoryview(bytes(MAX_PAYLOAD_BYTES + 1))
    for kind in FrameKind:
        header = FrameHeader(kind=kind, payload_bytes=len(large))
        into = memoryview(bytearray(HEADER_BYTES))
        if kind is FrameKind.CHUNK:
            pack_header(header, payload=large, into=into)
            assert unpack_header(into) == header
        else:
            with pytest.raises(ValueError, match="allowed"):
                pack_header(header, payload=large, into=into)
