"""Raw KV of 8 bits that comes from a peer: its bytes as they are, unless its scales are no numbers."""

import numpy as np
import pytest
import torch

from kvstore.errors import TransferCorrupted
from kvstore.layout import KvLayout
from workers.engine.device_kv_pool import DeviceKvPool
from workers.errors import PullCorrupted
from workers.model.kv_pages import KvPages
from workers.raw_blocks import FinitePages, copy_raw

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=8, dtype="int8")


def device_pool() -> DeviceKvPool:
    pages = KvPages(
        pages_LP2GBC=torch.zeros(2, 4, 2, 1, 16, 8, dtype=torch.int8),
        scales_LP2GB=torch.zeros(2, 4, 2, 1, 16),
    )
    return DeviceKvPool(LAYOUT, pages, num_pages=4)


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


@pytest.mark.parametrize("scale", [np.inf, np.nan, 3e38, -3e38], ids=str)
def test_blocks_of_a_layer_come_into_pages_unless_a_scale_makes_no_number(scale: float) -> None:
    finite, half = FinitePages(device_pool()), LAYOUT.layer_block_bytes
    good, bad = (
        blocks(1, last_scale=each)[0, half:].tobytes() for each in (np.finfo(np.float32).max / 127, scale)
    )
    finite.write(layer=1, page_ids=[0, 2], data=memoryview(2 * good))
    with pytest.raises(TransferCorrupted, match="2 blocks of layer 1 hold NaN or infinity"):
        finite.write(layer=1, page_ids=[0, 2], data=memoryview(good + bad))
    held = bytearray(2 * half)
    finite.read(layer=1, page_ids=[0, 2], into=memoryview(held))
    assert held == 2 * good
