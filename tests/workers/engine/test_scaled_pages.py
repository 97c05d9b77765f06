"""The engine that workers serve with, with pages of 8 bits, on the CPU with the formulas of a GPU's kernels."""

from pathlib import Path

import numpy as np
import pytest

from tests.workers.engine.test_device_engine import REFERENCE, advance, answers, new_requests
from workers.engine.engine import Engine, load_engine
from workers.engine.offline_engine import build_engine, load_model
from workers.engine.offline_settings import OfflineSettings

NUM_PAGES = 32
SCALED = pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])


def engine_of(checkpoint: Path, kv_dtype: str) -> Engine:
    return load_engine(
        model_path=checkpoint, num_pages=NUM_PAGES, max_model_len=128, kv_dtype=kv_dtype, compute=REFERENCE
    )


@SCALED
def test_answers_are_the_same_however_their_tokens_are_shared_out_over_steps(
    checkpoint: Path, kv_dtype: str
) -> None:
    settings = OfflineSettings(
        compute=REFERENCE, kv_dtype=kv_dtype, num_pages=NUM_PAGES, max_model_len=128, max_num_seqs=2,
        max_num_batched_tokens=5,
    )  # fmt: skip
    offline = build_engine(load_model(checkpoint, settings, on_progress=lambda share: None), settings)
    for temperature in (0.0, 0.8):
        requests = new_requests(temperature=temperature)
        expected = [
            generation.output_token_ids
            for generation in offline.generate((r.prompt_token_ids, r.sampling) for r in requests)
        ]
        got = answers(engine_of(checkpoint, kv_dtype), requests)
        for ours, theirs in zip(
            got, expected, strict=True
        ):  # which end with an end of sequence, and ours do not
            num_both = min(len(ours), len(theirs))
            assert num_both
            assert ours[:num_both] == theirs[:num_both]


@SCALED
@pytest.mark.parametrize("way", ["layer by layer", "by way of slots"])
def test_a_request_goes_on_in_another_engine_with_the_bytes_of_its_pages(
    checkpoint: Path, kv_dtype: str, way: str
) -> None:
    source, target, alone = (engine_of(checkpoint, kv_dtype) for _ in range(3))
    expected = answers(alone, new_requests(temperature=0.0), num_steps=12)
    requests, pages = new_requests(temperature=0.0), range(NUM_PAGES)
    advance(source, requests, most=11)
    for _ in range(4):
        advance(source, requests)
    layout = source.model.layout
    if way == "layer by layer":
        blocks = bytearray(NUM_PAGES * layout.layer_block_bytes)
        for layer in range(layout.num_layers):
            source.kv_pool.read(layer=layer, page_ids=pages, into=memoryview(blocks))
            target.kv_pool.write(layer=layer, page_ids=pages, data=memoryview(blocks))
    else:
        arena_SX = np.zeros((NUM_PAGES, layout.block_bytes), np.uint8)
        source.kv_pool.save(pages, arena_SX, pages)
        target.kv_pool.load(pages, arena_SX, pages)
    for _ in range(8):
        advance(target, requests)
    assert [request.output_token_ids for request in requests] == expected


@SCALED
def test_a_memory_setting_has_room_for_more_of_these_pages(checkpoint: Path, kv_dtype: str) -> None:
    num_bytes = 10 * load_engine(model_path=checkpoint, num_pages=1).model.layout.block_bytes
    engine = load_engine(
        model_path=checkpoint, kv_cache_bytes=num_bytes, kv_dtype=kv_dtype, compute=REFERENCE
    )
    assert engine.kv_pool.num_pages == 32  # a number of 16 with its scale: 20 bytes where float32 has 64


def test_a_cpus_own_kernels_have_none_of_them(checkpoint: Path) -> None:
    with pytest.raises(
        ValueError, match="kv_dtype int8 is served with attention triton or reference, got numba"
    ):
        load_engine(model_path=checkpoint, num_pages=1, kv_dtype="int8")
