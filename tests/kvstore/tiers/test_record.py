import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import BlockKey
from kvstore.tiers.record import (
    MAX_POSITION,
    MAX_RECORD_BLOCKS,
    RecordHeader,
    header_bytes,
    pack_record_header,
    unpack_record_header,
)
from kvstore.tiers.tier import BlockRun

keys = st.binary(min_size=16, max_size=16).map(BlockKey)
blocks = st.lists(st.tuples(keys, st.integers(0, 2**64 - 1)), min_size=1, max_size=MAX_RECORD_BLOCKS)


@st.composite
def headers(draw: st.DrawFn) -> RecordHeader:
    run_keys, checksums = zip(*draw(blocks), strict=True)
    run = BlockRun(
        root=draw(keys), parent=draw(keys), first_position=draw(st.integers(0, MAX_POSITION)), keys=run_keys
    )
    first_block, used_s = draw(st.integers(0, 2**64 - 1)), draw(st.floats(0, 2e9))
    return RecordHeader(run=run, first_block=first_block, used_s=used_s, checksums=checksums)


@given(header=headers(), seed=st.integers(0, 2**65))
def test_a_header_comes_back_whatever_follows_it(header: RecordHeader, seed: int) -> None:
    data = pack_record_header(header, seed=seed)
    assert len(data) == header_bytes(len(header.checksums))
    assert unpack_record_header(data + b"blocks", seed=seed) == header


@given(header=headers(), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_header_is_read_from_changed_bytes(header: RecordHeader, where: float, bit: int) -> None:
    data = bytearray(pack_record_header(header, seed=7))
    data[int(where * len(data))] ^= 1 << bit
    assert unpack_record_header(bytes(data), seed=7) is None


@given(header=headers(), share=st.floats(0, 1, exclude_max=True))
def test_no_header_is_read_from_its_beginning(header: RecordHeader, share: float) -> None:
    data = pack_record_header(header, seed=7)
    assert unpack_record_header(data[: int(share * len(data))], seed=7) is None


@given(header=headers())
def test_a_header_counts_only_where_it_was_written(header: RecordHeader) -> None:
    data = pack_record_header(header, seed=7)
    assert unpack_record_header(data, seed=8) is None


def test_a_record_has_a_checksum_for_every_block() -> None:
    run = BlockRun(
        root=BlockKey(bytes(16)), parent=BlockKey(bytes(16)), first_position=0, keys=(BlockKey(bytes(16)),)
    )
    with pytest.raises(ValueError, match="shorter"):
        pack_record_header(RecordHeader(run=run, first_block=0, used_s=0, checksums=()), seed=0)


@pytest.mark.parametrize(("first_position", "used_s"), [(2**40, 1.0), (0, float("nan")), (0, -1.0)])
def test_a_header_that_no_index_can_hold_is_none(first_position: int, used_s: float) -> None:
    key = BlockKey(bytes(16))
    run = BlockRun(root=key, parent=key, first_position=first_position, keys=(key,))
    data = pack_record_header(RecordHeader(run=run, first_block=0, used_s=used_s, checksums=(0,)), seed=7)
    assert unpack_record_header(data, seed=7) is None
