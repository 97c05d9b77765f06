"""Weights of 8 or 4 bits out of whole ones, rounded to the nearest: `kernels.gpu.quantized_weight`.

Groups of 128 inputs, or of 64 or 32 where those do not fit, have a scale each, and in int4 a zero. Embedding, output
matrix and routers stay whole: they are small or sensitive.

N outputs, K inputs, J groups, E experts.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from kernels.gpu.quantized_weight import GROUPS, QuantizedWeight, pack_int4, stacked
from workers.model.weights import DenseMlp, LayerWeights, Linear, ModelWeights, MoeMlp


def quantize_weights(weights: ModelWeights, kind: str) -> ModelWeights:
    """Raises `ValueError` for a layer whose inputs are not whole groups."""
    return replace(weights, layers=tuple(_layer(layer, QUANTIZERS[kind]) for layer in weights.layers))


def _layer(layer: LayerWeights, quantize: "Quantizer") -> LayerWeights:
    return replace(
        layer, qkv=_linear(layer.qkv, quantize), output=_linear(layer.output, quantize),
        mlp=_mlp(layer.mlp, quantize),
    )  # fmt: skip


def _mlp(mlp: DenseMlp | MoeMlp, quantize: "Quantizer") -> DenseMlp | MoeMlp:
    if isinstance(mlp, DenseMlp):
        return DenseMlp(gate_up=_linear(mlp.gate_up, quantize), down=_linear(mlp.down, quantize))
    return replace(
        mlp, gate_up_EWD=_experts(mlp.gate_up_EWD, quantize), down_EDI=_experts(mlp.down_EDI, quantize)
    )


def _experts(weight_ENK: torch.Tensor, quantize: "Quantizer") -> QuantizedWeight:
    return stacked([quantize(weight_NK) for weight_NK in weight_ENK])


def _linear(linear: Linear, quantize: "Quantizer") -> Linear:
    return Linear(quantize(linear.weight), linear.bias)


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
    fitting = [size for size in GROUPS if num_inputs % size == 0]
    if not fitting:
        raise ValueError(
            f"a layer of {num_inputs} inputs is not whole groups of {', '.join(map(str, GROUPS))}: not quantised"
        )
    return weight_NK.float().view(num_outputs, -1, fitting[0])


def _divisors(scales: torch.Tensor) -> torch.Tensor:
    """A group of zeros may have any scale but zero."""
    return torch.where(scales == 0, 1.0, scales)


Quantizer = Callable[[torch.Tensor], QuantizedWeight]
QUANTIZERS: dict[str, Quantizer] = {"w8a16": _int8, "w4a16": _int4, "fp8": _fp8}
