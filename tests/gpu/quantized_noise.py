"""Quantised weights of noise, and such as are compiled and not run."""

import torch
from inputs import DEVICE, IS_INTERPRETED, shape_only

from kernels.gpu.fp8_rows import fp8_rows
from kernels.gpu.quantized_weight import GROUP, QuantizedWeight

KINDS = ("int8", "fp8", "int4")


def noise_weight(
    num_outputs: int,
    num_groups: int,
    kind: str,
    *,
    group_size: int = GROUP,
    orders: torch.Tensor | None = None,
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(7)
    shape = (num_outputs, num_groups * group_size)
    if kind == "fp8":
        numbers = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    elif kind == "int8":
        numbers = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    else:
        half = (num_outputs, num_groups * group_size // 2)
        numbers = torch.randint(0, 256, half, generator=generator, dtype=torch.uint8)
    scales = (
        torch.rand(num_outputs, num_groups, generator=generator) / {"int8": 64, "fp8": 1, "int4": 4}[kind]
    )
    zeros = torch.randint(0, 16, scales.shape, generator=generator).float() if kind == "int4" else None
    return QuantizedWeight(
        numbers_NK=numbers.to(DEVICE),
        scales_NJ=scales.to(DEVICE),
        zeros_NJ=None if zeros is None else zeros.to(DEVICE),
        orders_EK=orders,
    )


def noise_orders(num_experts: int, num_inputs: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(num_inputs, generator=generator) for _ in range(num_experts)]).to(
        DEVICE
    )


def as_multiplied(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """Of a product with fp8, the x that its rows of 8 bits stand for, which the reference rounds to itself.

    Rounded by the kernel, as the interpreter halves some of the numbers (`assert_steps_close`).
    """
    if not weight.is_fp8:
        return x
    x8, scales = fp8_rows(x)
    return x8.float() * scales.unsqueeze(1)


def allowed_error(weight: QuantizedWeight, dtype: torch.dtype) -> float:
    """Of a product with rows of `dtype`, by norm."""
    if weight.is_fp8 and not IS_INTERPRETED:
        return 1e-2  # the tensor core adds up a group in few bits
    return {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


def weight_shape_only(
    num_outputs: int, num_inputs: int, kind: str, *, group_size: int = GROUP
) -> QuantizedWeight:
    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}[kind]
    per_group = (num_outputs, num_inputs // group_size)
    return QuantizedWeight(
        numbers_NK=shape_only(num_outputs, num_inputs // (2 if kind == "int4" else 1), dtype=dtype),
        scales_NJ=shape_only(*per_group, dtype=torch.float32),
        zeros_NJ=shape_only(*per_group, dtype=torch.float32) if kind == "int4" else None,
    )
