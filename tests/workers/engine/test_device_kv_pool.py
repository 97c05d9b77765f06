"""A device's pool against the CPU's: after any calls both hold the same bytes. The device is the CPU here."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codec.codec import KvCodec
from kvstore.layout import ITEM_BYTES, KvLayout
from workers.engine.device_kv_pool import DeviceKvPool, consecutive
from workers.engine.kv_pool import KvPool
from workers.model.kv_pages import PAGE_DTYPES, KvPages

NUM_PAGES, NUM_SLOTS, NUM_LAYERS = 6, 5, 3


def layout_of(dtype: str) -> KvLayout:
    return KvLayout(num_layers=NUM_LAYERS, num_kv_heads=2, head_dim=8, dtype=dtype)


def pools(dtype: str, *, staging_blocks: int) -> tuple[KvPool, DeviceKvPool]:
    """With the same random pages; staging for so many blocks, so that calls go in pieces."""
    layout = layout_of(dtype)
    cpu = KvPool(as_a_cpu_has_it(layout), num_pages=NUM_PAGES)
    cpu.pages_LP2GBC.normal_(generator=torch.Generator().manual_seed(1))
    if layout.is_scaled:
        numbers = cpu.pages_LP2GBC.view(torch.uint8)
        numbers.copy_(torch.from_numpy(random_bytes(*numbers.shape, seed=1)))
    blocks_LPX = bytes_of(cpu)
    shape = (NUM_LAYERS, NUM_PAGES, 2, 2, 16)
    numbers_LPX, scales_LPX = blocks_LPX.tensor_split([layout.layer_numbers_bytes], dim=2)
    pages = KvPages(
        pages_LP2GBC=numbers_LPX.contiguous().view(PAGE_DTYPES[dtype]).view(*shape, 8),
        scales_LP2GB=scales_LPX.contiguous().view(torch.float32).view(shape) if layout.is_scaled else None,
    )
    device = DeviceKvPool(
        layout, pages, num_pages=NUM_PAGES, staging_bytes=staging_blocks * layout.block_bytes
    )
    return cpu, device


def as_a_cpu_has_it(layout: KvLayout) -> KvLayout:
    """A CPU has no pages of 8 bits: float32 whose blocks are as large, as pools ask only for bytes."""
    return replace(layout, dtype="float32", head_dim=(8 + 4) // 4) if layout.is_scaled else layout


def bytes_of(pool: KvPool | DeviceKvPool) -> torch.Tensor:
    """[L, P, X]: numbers, then scales."""
    tensors = (
        [pool.pages_LP2GBC]
        if isinstance(pool, KvPool)
        else [pool.pages.pages_LP2GBC, pool.pages.scales_LP2GB]
    )
    return torch.cat([x.contiguous().view(torch.uint8).flatten(2) for x in tensors if x is not None], dim=2)


def random_bytes(*shape: int, seed: int = 2) -> np.ndarray:
    """Finite numbers of any dtype: the codec takes no others."""
    return np.random.default_rng(seed).integers(0, 120, shape, dtype=np.uint8)


def distinct(most: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, most - 1), unique=True, max_size=most)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, list[int], list[int], int]:
    """(method, page ids, slots, layer)"""
    slots = draw(distinct(NUM_SLOTS))
    page_ids = draw(st.permutations(range(NUM_PAGES)))[: len(slots)]
    method = draw(st.sampled_from(["read", "write", "save", "load", "fill"]))
    return method, page_ids, slots, draw(st.integers(0, NUM_LAYERS - 1))


def call(
    pool: KvPool | DeviceKvPool,
    method: str,
    pages: list[int],
    slots: list[int],
    layer: int,
    arena_SX: np.ndarray,
) -> bytes:
    """What was read, or the arena."""
    layer_bytes = len(pages) * pool.layout.layer_block_bytes
    match method:
        case "read":
            into = bytearray(layer_bytes)
            pool.read(layer=layer, page_ids=pages, into=memoryview(into))
            return bytes(into)
        case "write":
            pool.write(
                layer=layer, page_ids=pages, data=memoryview(random_bytes(layer_bytes, seed=layer).tobytes())
            )
        case "save":
            pool.save(pages, arena_SX, slots)
        case "load":
            pool.load(pages, arena_SX, slots)
        case "fill":
            codec = KvCodec(pool.layout, profile=None)
            chunk = codec.encode(arena_SX, slots, level=0) if slots else b""

            def decode(memory_SX: np.ndarray, into: Sequence[int]) -> None:
                if chunk:
                    codec.decode(chunk, memory_SX, into)

            pool.fill(pages, decode)
    return arena_SX.tobytes()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(ITEM_BYTES)), st.integers(1, 4), st.lists(calls(), max_size=8))
def test_any_calls_leave_the_same_bytes_in_both_pools(
    dtype: str, staging_blocks: int, made: list[tuple[str, list[int], list[int], int]]
) -> None:
    cpu, device = pools(dtype, staging_blocks=staging_blocks)
    arenas = [random_bytes(NUM_SLOTS, cpu.layout.block_bytes) for _ in range(2)]
    for method, pages, slots, layer in made:
        ours = call(device, method, pages, slots, layer, arenas[0])
        assert ours == call(cpu, method, pages, slots, layer, arenas[1])
        assert torch.equal(bytes_of(device), bytes_of(cpu))


@pytest.mark.parametrize("level", range(1, 7))
def test_the_codec_fills_pages_as_it_does_slots(level: int) -> None:
    cpu, device = pools("float32", staging_blocks=2)
    codec = KvCodec(cpu.layout, profile=None)
    chunk = codec.encode(cpu.blocks_PLX, [4, 0, 2], level=level)
    for pool in (cpu, device):
        pool.fill([5, 1, 3], lambda memory, slots: codec.decode(chunk, memory, slots))
    assert torch.equal(bytes_of(device), bytes_of(cpu))


def test_what_cannot_be_decoded_leaves_the_pages_alone() -> None:
    _, device = pools("float32", staging_blocks=2)
    before = bytes_of(device)

    def fails(memory: np.ndarray, slots: Sequence[int]) -> None:
        memory[list(slots)] = 0
        raise OSError("cut short")

    with pytest.raises(OSError, match="cut short"):
        device.fill([0, 1], fails)
    assert torch.equal(bytes_of(device), before)


def test_staging_holds_a_block_however_little_is_given() -> None:
    layout = layout_of("float32")
    pages = KvPages(pages_LP2GBC=torch.zeros(NUM_LAYERS, 2, 2, 2, 16, 8), scales_LP2GB=None)
    pool = DeviceKvPool(layout, pages, num_pages=2, staging_bytes=1)
    arena_SX = random_bytes(2, layout.block_bytes)
    pool.load([0, 1], arena_SX, [1, 0])
    back_SX = np.zeros_like(arena_SX)
    pool.save([0, 1], back_SX, [1, 0])
    assert np.array_equal(back_SX, arena_SX)


def test_threads_that_copy_at_once_do_not_mix_their_blocks() -> None:
    _, device = pools("float32", staging_blocks=1)
    failures: list[int] = []

    def round_trips(page: int) -> None:
        arena_SX = random_bytes(2, device.layout.block_bytes, seed=page)
        for _ in range(20):
            arena_SX[1] = 0
            device.load([page], arena_SX, [0])
            device.save([page], arena_SX, [1])
            if not np.array_equal(arena_SX[0], arena_SX[1]):
                failures.append(page)

    threads = [threading.Thread(target=round_trips, args=(page,)) for page in range(NUM_PAGES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("num_bytes", [0, 1])
def test_a_buffer_of_another_size_is_refused(num_bytes: int) -> None:
    _, device = pools("float32", staging_blocks=1)
    for copy in (
        lambda memory: device.read(layer=0, page_ids=[1], into=memory),
        lambda memory: device.write(layer=0, page_ids=[1], data=memory),
    ):
        with pytest.raises(ValueError, match=rf"2048 bytes, got {num_bytes}"):
            copy(memoryview(bytearray(num_bytes)))


@pytest.mark.parametrize(
    ("page_ids", "slots", "slot_bytes", "message"),
    [
        ([0, 1], [0], 6144, "2 blocks need as many slots"),
        ([0], [4], 6144, "1 blocks need as many slots of 4"),
        ([6], [0], 6144, r"page ids must be in 0\.\.5, got 6"),
        ([-1], [0], 6144, r"page ids must be in 0\.\.5, got -1"),
        ([0], [0], 6136, "a slot must have 6144 bytes, got 6136"),
    ],
)
def test_slots_and_pages_that_do_not_fit_are_refused(
    page_ids: list[int], slots: list[int], slot_bytes: int, message: str
) -> None:
    _, device = pools("float32", staging_blocks=1)
    arena_SX = np.zeros((4, slot_bytes), np.uint8)
    for copy in (device.save, device.load):
        with pytest.raises(ValueError, match=message):
            copy(page_ids, arena_SX, slots)


@given(st.lists(st.integers(0, 9), max_size=12))
def test_runs_of_slots_are_all_slots_in_order_and_as_few_as_can_be(slots: list[int]) -> None:
    runs = list(consecutive(slots))
    assert [slot for _, run in runs for slot in range(run.start, run.stop)] == slots
    assert [place for places, _ in runs for place in range(places.start, places.stop)] == list(
        range(len(slots))
    )
    assert all(before.stop != after.start for (_, before), (_, after) in pairwise(runs))
