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

    def load(*, dtype: str = "float32", quantize: str = "none", kv_dtype: str = "auto") -> ModelInfo:
        return load_model_info(
            path, Checkpoint(path), dtype=dtype, quantize=quantize, kv_dtype=kv_dtype, max_model_len=None
        )

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


def test_kv_of_8_bits_is_that_of_another_model(info_of: Callable[..., ModelInfo]) -> None:
    whole, int8, fp8 = (info_of(kv_dtype=kv_dtype) for kv_dtype in ("auto", "int8", "fp8"))
    weights = info_of(quantize="int8")
    assert len({info.fingerprint for info in (whole, int8, fp8, weights)}) == 4
    assert [info.layout.dtype for info in (whole, int8, fp8)] == ["float32", "int8", "fp8"]
    assert {info.dtype for info in (whole, int8, fp8)} == {"float32"}


def test_pages_of_a_dtype_that_there_is_not_are_refused(info_of: Callable[..., ModelInfo]) -> None:
    with pytest.raises(ValueError, match="kv_dtype must be one of auto, int8, fp8, got 'int4'"):
        info_of(kv_dtype="int4")


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
