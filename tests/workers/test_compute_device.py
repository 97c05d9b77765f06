"""What of device, kernels and quantization goes together."""

from typing import Any

import pytest

from workers.compute_device import ComputeDevice


@pytest.mark.parametrize(
    ("settings", "backend"),
    [
        ({}, "numba"),
        ({"device": "cuda"}, "triton"),
        ({"device": "cuda:3"}, "triton"),
        ({"device": "cuda:3", "attention": "reference"}, "reference"),
        ({"attention": "reference"}, "reference"),
    ],
)
def test_kernels_are_those_of_the_device_unless_others_are_named(
    settings: dict[str, Any], backend: str
) -> None:
    assert ComputeDevice(**settings).backend == backend


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "device must be one of cpu, cuda, cuda:N, got 'tpu'"),
        ({"device": "cuda:x"}, "got 'cuda:x'"),
        ({"attention": "flash"}, "attention must be one of numba, triton, reference, got 'flash'"),
        ({"device": "cuda:1", "attention": "numba"}, "numba computes on the cpu, got device cuda:1"),
        ({"attention": "triton"}, "needs TRITON_INTERPRET=1"),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_value(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        ComputeDevice(**settings)


def test_quantized_weights_are_served_by_the_kernels_that_have_them() -> None:
    ComputeDevice().check_quantization("int8")
    for quantize in ("none", "w8a16", "w4a16", "fp8"):
        ComputeDevice(device="cuda").check_quantization(quantize)
    with pytest.raises(ValueError, match="w4a16 is served with attention triton or reference, got numba"):
        ComputeDevice().check_quantization("w4a16")
    with pytest.raises(ValueError, match="int8 is served with attention numba alone, got triton"):
        ComputeDevice(device="cuda").check_quantization("int8")


def test_kv_of_8_bits_is_served_by_the_kernels_that_have_it() -> None:
    ComputeDevice().check_kv_dtype("auto")
    for compute in (ComputeDevice(device="cuda"), ComputeDevice(attention="reference")):
        compute.check_kv_dtype("fp8")
    with pytest.raises(
        ValueError, match="kv_dtype fp8 is served with attention triton or reference, got numba"
    ):
        ComputeDevice().check_kv_dtype("fp8")
