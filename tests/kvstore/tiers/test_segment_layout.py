import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.tiers.record import MAX_RECORD_BLOCKS, header_bytes
from kvstore.tiers.segment_header import SEGMENT_HEADER_BYTES
from kvstore.tiers.segment_layout import (
    LARGE_PAGE_BYTES,
    PAGE_BYTES,
    SegmentLayout,
    occupied_bytes,
)

layouts = st.builds(
    SegmentLayout.of, stored_bytes=st.integers(1, 2**24), capacity_bytes=st.integers(0, 2**45)
)


@given(layout=layouts)
def test_a_segment_has_room_for_at_least_one_block_and_a_header_for_each(layout: SegmentLayout) -> None:
    assert layout.num_blocks >= 1
    assert SEGMENT_HEADER_BYTES + layout.num_blocks * header_bytes(1) <= layout.blocks_start
    end = layout.blocks_start
    for _ in range(min(layout.num_blocks, 100)):
        end = layout.record_start(end, 1) + layout.stored_bytes
    assert end <= layout.segment_bytes


@given(layout=layouts, end=st.integers(0, 2**40), num_blocks=st.integers(1, MAX_RECORD_BLOCKS))
def test_no_record_takes_more_than_the_most(layout: SegmentLayout, end: int, num_blocks: int) -> None:
    taken_bytes = layout.record_start(end, num_blocks) + num_blocks * layout.stored_bytes - end
    assert num_blocks * layout.stored_bytes <= taken_bytes <= layout.max_record_bytes(num_blocks)


@pytest.mark.parametrize(
    ("stored_bytes", "unit_bytes"), [(65536, LARGE_PAGE_BYTES), (2**21, LARGE_PAGE_BYTES), (5000, PAGE_BYTES)]
)
def test_blocks_begin_at_a_page_and_those_made_of_large_pages_at_a_large_one(
    stored_bytes: int, unit_bytes: int
) -> None:
    layout = SegmentLayout.of(stored_bytes=stored_bytes, capacity_bytes=2**34)
    assert layout.blocks_start % unit_bytes == 0
    # Headers are small beside what they describe.
    assert layout.blocks_start < layout.segment_bytes / 40


@given(
    stored_bytes=st.integers(1, 2**20),
    capacity_bytes=st.integers(0, 2**36),
    share=st.floats(0, 1),
    lengths=st.lists(st.integers(1, MAX_RECORD_BLOCKS), min_size=1, max_size=60),
)
def test_moved_blocks_never_take_more_than_is_kept_free_for_them(
    stored_bytes: int, capacity_bytes: int, share: float, lengths: list[int]
) -> None:
    layout = SegmentLayout.of(stored_bytes=stored_bytes, capacity_bytes=capacity_bytes)
    longest, num_left = max(1, min(MAX_RECORD_BLOCKS, layout.num_blocks // 4)), layout.num_blocks
    # What grows has so much left, and headers for it.
    end = int(layout.blocks_start + share * (layout.segment_bytes - layout.blocks_start))
    headers_end = SEGMENT_HEADER_BYTES
    num_moved, taken_bytes = 0, -occupied_bytes(end)
    for length in lengths:
        num_blocks = min(length, longest, num_left)
        if not num_blocks:
            break
        record_end = layout.record_start(end, num_blocks) + num_blocks * stored_bytes
        if record_end > layout.segment_bytes or headers_end + header_bytes(num_blocks) > layout.blocks_start:
            taken_bytes += occupied_bytes(end)
            headers_end, end = SEGMENT_HEADER_BYTES, layout.blocks_start
            record_end = layout.record_start(end, num_blocks) + num_blocks * stored_bytes
        headers_end, end = headers_end + header_bytes(num_blocks), record_end
        num_left, num_moved = num_left - num_blocks, num_moved + num_blocks
    taken_bytes += occupied_bytes(end)
    assert taken_bytes <= layout.moved_bytes(num_moved * stored_bytes)
