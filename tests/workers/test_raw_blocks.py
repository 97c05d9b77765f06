"""Raw KV of 8 bits that comes from a peer: its bytes as they are, unless its scales are no numbers."""

import numpy as np
import pytest

from kvstore.errors import TransferCorrupted
from kvstore.layout import KvLayout
from workers.errors import PullCorrupted
from workers.raw_blocks import FinitePages, copy_raw

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=8, dtype="int8")


class FakePages:
    layout = LAYOUT
    num_pages = 4

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def read(self, *, layer: int, page_ids: object, into: memoryview) -> None:
        raise NotImplementedError

    def write(self, *, layer: int, page_ids: object, data: memoryview) -> None:
        self.written.append(bytes(data))


def blocks(num_blocks: int, *, last_scale: float) -> np.ndarray:
    """All numbers are -1, whose bytes would be NaN as float32."""
    data = np.full((num_blocks, LAYOUT.num_layers, LAYOUT.layer_block_bytes), 255, np.uint8)
    scales = data[:, :, LAYOUT.layer_numbers_bytes :].view(np.float32)
    scales[:] = 0.5
    scales[-1, -1, -1] = last_scale
    return data.reshape(num_blocks, -1)


def test_blocks_of_a_chunk_come_into_their_slots_unless_a_scale_is_no_number() -> None:
    arena = np.zeros((4, LAYOUT.block_bytes), np.uint8)
    sent = blocks(2, last_scale=0.25)
    copy_raw(memoryview(sent.tobytes()), arena, [3, 1], LAYOUT)
    assert np.array_equal(arena[[3, 1]], sent)
    with pytest.raises(PullCorrupted, match="raw block 1 of 2"):
        copy_raw(memoryview(blocks(2, last_scale=np.nan).tobytes()), arena, [3, 1], LAYOUT)


def test_blocks_of_a_layer_come_into_pages_unless_a_scale_is_no_number() -> None:
    pages = FakePages()
    finite = FinitePages(pages)
    half = LAYOUT.layer_block_bytes
    good, bad = (blocks(1, last_scale=scale)[0, half:].tobytes() for scale in (0.25, np.inf))
    finite.write(layer=1, page_ids=[0, 2], data=memoryview(2 * good))
    with pytest.raises(TransferCorrupted, match="2 blocks of layer 1 hold NaN or infinity"):
        finite.write(layer=1, page_ids=[0, 2], data=memoryview(good + bad))
    assert pages.written == [2 * good]
