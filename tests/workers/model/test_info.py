"""What a fingerprint tells apart: KV of different fingerprints is never taken for each other's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workers.model.checkpoint import Checkpoint
from workers.model.info import ModelInfo, load_model_info


@pytest.fixture
def info_of(checkpoint_of: Callable[[str], tuple[Any, Path]]) -> Callable[..., ModelInfo]:
    _, path = checkpoint_of("llama")

    def load(*, dtype: str, quantize: str) -> ModelInfo:
        return load_model_info(path, Checkpoint(path), dtype=dtype, quantize=quantize, max_model_len=None)

    return load


def test_a_quantized_model_has_a_fingerprint_of_its_own_and_the_layout_of_float32(
    info_of: Callable[..., ModelInfo],
) -> None:
    exact, bfloat16, int8 = (
        info_of(dtype=dtype, quantize=quantize)
        for dtype, quantize in (("float32", "none"), ("bfloat16", "none"), ("float32", "int8"))
    )
    assert len({exact.fingerprint, bfloat16.fingerprint, int8.fingerprint}) == 3
    assert int8.layout == exact.layout


@pytest.mark.parametrize(
    ("dtype", "quantize", "message"),
    [
        ("bfloat16", "int8", "quantize int8 needs dtype float32, got 'bfloat16'"),
        ("float32", "int4", "quantize must be one of none, int8, w8a16, w4a16, fp8, got 'int4'"),
    ],
)
def test_what_cannot_be_computed_has_none(
    dtype: str, quantize: str, message: str, info_of: Callable[..., ModelInfo]
) -> None:
    with pytest.raises(ValueError, match=message):
        info_of(dtype=dtype, quantize=quantize)
