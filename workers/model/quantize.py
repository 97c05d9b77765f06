"""Weights of 8 or 4 bits (`kernels.gpu.quantized_weight`) out of whole ones, rounded to the nearest as they are read.

Groups of 128 inputs, or of 64 or 32 where those do not fit, have a scale each, and in int4 a zero. Embedding, output
matrix and routers stay whole: they are small or sensitive.

N outputs, K inputs, J groups, E experts.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from kernels.gpu.quantized_weight import GROUPS, QuantizedWeight, pack_int4, stacked
from workers.model.weights import Tensors

_WHOLE = "lm_head"


def quantized_product(
    tensors: Tensors,
    kind: str,
    names_E: Sequence[Mapping[str, int]],
    num_inputs: int,
    device: torch.device,
) -> QuantizedWeight | None:
    """The rows of all names as one matrix, one expert's below another's: whole at a time are those of one expert.

    None: they stay whole. Raises `CheckpointError`, and `ValueError` for inputs that are not whole groups.
    """
    if _WHOLE in names_E[0]:
        return None
    if not any(num_inputs % size == 0 for size in GROUPS):
        raise ValueError(
            f"{next(iter(names_E[0]))} has {num_inputs} inputs, which are not whole groups of"
            f" {', '.join(map(str, GROUPS))}: it cannot be quantised"
        )
    experts = []
    for names in names_E:
        weight_NK = torch.empty(sum(names.values()), num_inputs, device=device)
        start = 0
        for name, num_rows in names.items():
            tensors.copy_into(weight_NK[start : start + num_rows], f"{name}.weight")
            start += num_rows
        experts.append(QUANTIZERS[kind](weight_NK))
    return stacked(experts)


def _int8(weight_NK: torch.Tensor) -> QuantizedWeight:
    weight_NJK = _groups(weight_NK)
    scales_NJ1 = _divisors(weight_NJK.abs().amax(-1, keepdim=True) / 127)
    numbers_NJK = (weight_NJK / scales_NJ1).round().to(torch.int8)
    return QuantizedWeight(numbers_NK=numbers_NJK.flatten(1), scales_NJ=scales_NJ1.squeeze(-1), zeros_NJ=None)


def _fp8(weight_NK: torch.Tensor) -> QuantizedWeight:
    weight_NJK = _groups(weight_NK)
    scales_NJ1 = _divisors(weight_NJK.abs().amax(-1, keepdim=True) / 448)
    numbers_NJK = (weight_NJK / scales_NJ1).to(torch.float8_e4m3fn)
    return QuantizedWeight(numbers_NK=numbers_NJK.flatten(1), scales_NJ=scales_NJ1.squeeze(-1), zeros_NJ=None)


def _int4(weight_NK: torch.Tensor) -> QuantizedWeight:
    weight_NJK = _groups(weight_NK)
    low_NJ1 = weight_NJK.amin(-1, keepdim=True).clamp(max=0)
    high_NJ1 = weight_NJK.amax(-1, keepdim=True).clamp(min=0)
    scales_NJ1 = _divisors((high_NJ1 - low_NJ1) / 15)
    zeros_NJ1 = (-low_NJ1 / scales_NJ1).round()
    numbers_NJK = ((weight_NJK / scales_NJ1).round() + zeros_NJ1).clamp(0, 15).to(torch.uint8)
    return QuantizedWeight(
        numbers_NK=pack_int4(numbers_NJK.flatten(1), group_size=numbers_NJK.shape[-1]),
        scales_NJ=scales_NJ1.squeeze(-1), zeros_NJ=zeros_NJ1.squeeze(-1),
    )  # fmt: skip


def _groups(weight_NK: torch.Tensor) -> torch.Tensor:
    """As large as fit: more groups are more scales to read."""
    num_outputs, num_inputs = weight_NK.shape
    return weight_NK.view(num_outputs, -1, next(size for size in GROUPS if num_inputs % size == 0))


def _divisors(scales: torch.Tensor) -> torch.Tensor:
    """A group of zeros may have any scale but zero."""
    return torch.where(scales == 0, 1.0, scales)


Quantizer = Callable[[torch.Tensor], QuantizedWeight]
QUANTIZERS: dict[str, Quantizer] = {"w8a16": _int8, "w4a16": _int4, "fp8": _fp8}
