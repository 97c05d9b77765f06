"""Pages as bytes: what is written is read, in the layout of the wire."""

import numpy as np
import pytest
import torch

from kvstore.codec.codec import KvCodec
from kvstore.layout import KvLayout
from workers.engine.kv_pool import KvPool

LAYOUT = KvLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype="float32")
BLOCK_BYTES = LAYOUT.layer_block_bytes


def random_pool(layout: KvLayout = LAYOUT) -> KvPool:
    pool = KvPool(layout, num_pages=6)
    pool.pages_LP2GBC.normal_(generator=torch.Generator().manual_seed(1))
    return pool


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_move_between_pools_in_any_order(dtype: str) -> None:
    layout = KvLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype=dtype)
    source, target = random_pool(layout), KvPool(layout, num_pages=6)
    blocks = bytearray(3 * layout.layer_block_bytes)
    source.read(layer=1, page_ids=[4, 0, 2], into=memoryview(blocks))
    target.write(layer=1, page_ids=[5, 1, 3], data=memoryview(blocks))
    assert torch.equal(target.pages_LP2GBC[1, [5, 1, 3]], source.pages_LP2GBC[1, [4, 0, 2]])
    assert not target.pages_LP2GBC[[0, 2]].any()
    assert not target.pages_LP2GBC[1, [0, 2, 4]].any()


def test_a_block_is_its_keys_by_head_and_token_then_its_values() -> None:
    pool, block = random_pool(), bytearray(BLOCK_BYTES)
    pool.read(layer=2, page_ids=[3], into=memoryview(block))
    keys_then_values = torch.frombuffer(block, dtype=torch.float32).view(2, 2, 16, 8)
    assert torch.equal(keys_then_values, pool.pages_LP2GBC[2, 3])


def test_no_pages_are_no_bytes() -> None:
    pool = random_pool()
    pool.read(layer=0, page_ids=[], into=memoryview(bytearray()))
    pool.write(layer=0, page_ids=[], data=memoryview(b""))


@pytest.mark.parametrize("num_bytes", [0, BLOCK_BYTES - 1, BLOCK_BYTES + 1])
def test_a_buffer_of_another_size_is_refused(num_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"{BLOCK_BYTES} bytes, got {num_bytes}"):
        random_pool().write(layer=0, page_ids=[1], data=memoryview(bytes(num_bytes)))


@pytest.mark.parametrize("page_id", [-1, 6])
def test_a_page_outside_the_pool_is_refused(page_id: int) -> None:
    with pytest.raises(ValueError, match=rf"0\.\.5, got {page_id}"):
        random_pool().read(layer=0, page_ids=[page_id], into=memoryview(bytearray(BLOCK_BYTES)))


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        KvPool(LAYOUT, num_pages=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_are_saved_to_slots_and_loaded_into_other_pages(dtype: str) -> None:
    layout = KvLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype=dtype)
    source, target = random_pool(layout), KvPool(layout, num_pages=6)
    arena_SX = np.zeros((5, layout.block_bytes), np.uint8)
    source.save([4, 0, 2], arena_SX, [3, 1, 0])
    assert not arena_SX[[2, 4]].any()
    block = bytearray(layout.layer_block_bytes)
    source.read(layer=1, page_ids=[0], into=memoryview(block))
    assert arena_SX[1].reshape(3, -1)[1].tobytes() == block
    target.load([5, 1, 3], arena_SX, [3, 1, 0])
    assert torch.equal(target.pages_LP2GBC[:, [5, 1, 3]], source.pages_LP2GBC[:, [4, 0, 2]])
    assert not target.pages_LP2GBC[:, [0, 2, 4]].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("level", range(7))
def test_the_codec_reads_and_writes_pages_as_it_does_slots(dtype: str, level: int) -> None:
    layout = KvLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype=dtype)
    codec = KvCodec(layout, profile=None)
    source, target = random_pool(layout), KvPool(layout, num_pages=6)
    arena_SX = np.zeros((5, layout.block_bytes), np.uint8)
    source.save([4, 0, 2], arena_SX, [3, 1, 0])
    chunk = codec.encode(source.blocks_PLX, [4, 0, 2], level=level)
    assert chunk == codec.encode(arena_SX, [3, 1, 0], level=level)
    codec.decode(chunk, arena_SX, [0, 4, 2])
    codec.decode(chunk, target.blocks_PLX, [5, 1, 3])
    assert not target.pages_LP2GBC[:, [0, 2, 4]].any()
    decoded_SX = np.zeros_like(arena_SX)
    target.save([5, 1, 3], decoded_SX, [0, 4, 2])
    assert np.array_equal(decoded_SX[[0, 4, 2]], arena_SX[[0, 4, 2]])


@pytest.mark.parametrize(
    ("page_ids", "slots", "slot_bytes", "message"),
    [
        ([0, 1], [0], LAYOUT.block_bytes, "2 blocks need as many slots"),
        ([0], [4], LAYOUT.block_bytes, "1 blocks need as many slots of 4"),
        ([6], [0], LAYOUT.block_bytes, "page ids must be in 0..5"),
        ([0], [0], LAYOUT.block_bytes - 8, "a slot must have"),
    ],
)
def test_slots_that_do_not_fit_are_refused(
    page_ids: list[int], slots: list[int], slot_bytes: int, message: str
) -> None:
    arena_SX = np.zeros((4, slot_bytes), np.uint8)
    for copy in (random_pool().save, random_pool().load):
        with pytest.raises(ValueError, match=message):
            copy(page_ids, arena_SX, slots)
