"""The kernels that a GPU's operations are made of, as one table: those in Triton, or the formulas that they stand for.

The second table is the oracle of the first on a whole model, and runs wherever torch does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kernels.gpu import (
    combine_experts,
    grouped_matmul,
    grouped_quantized_matmul,
    paged_attention,
    prefill_attention,
    quantized_linear,
    rms_norm,
    rotate_and_store,
    sample,
    silu_mul,
)

Function = Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """Functions with the arguments of the kernels of the same name, and results in the dtype of their input."""

    rms_norm: Function
    add_rms_norm_: Function
    silu_mul: Function
    rotate_and_store_: Function
    paged_attention: Function
    prefill_attention: Function
    grouped_matmul: Function
    grouped_quantized_matmul: Function
    combine_experts: Function
    quantized_linear: Function
    sample: Function


TRITON = Kernels(
    rms_norm=rms_norm.rms_norm,
    add_rms_norm_=rms_norm.add_rms_norm_,
    silu_mul=silu_mul.silu_mul,
    rotate_and_store_=rotate_and_store.rotate_and_store_,
    paged_attention=paged_attention.paged_attention,
    prefill_attention=prefill_attention.prefill_attention,
    grouped_matmul=grouped_matmul.grouped_matmul,
    grouped_quantized_matmul=grouped_quantized_matmul.grouped_quantized_matmul,
    combine_experts=combine_experts.combine_experts,
    quantized_linear=quantized_linear.quantized_linear,
    sample=sample.sample,
)


def _add_rms_norm_(
    residual_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, *, eps: float
) -> torch.Tensor:
    residual_TD += delta_TD
    return rms_norm.reference(residual_TD, weight_D, eps=eps)


def _rounded(reference: Function) -> Function:
    """The references compute in float32 and leave it at that."""

    def compute(x: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        result = reference(x, *arguments, **named)
        if isinstance(result, tuple):
            return result[0].to(x.dtype), *result[1:]
        return result.to(x.dtype)

    return compute


REFERENCE = Kernels(
    rms_norm=rms_norm.reference,
    add_rms_norm_=_add_rms_norm_,
    silu_mul=_rounded(silu_mul.reference),
    rotate_and_store_=rotate_and_store.reference_,
    paged_attention=_rounded(paged_attention.reference),
    prefill_attention=_rounded(prefill_attention.reference),
    grouped_matmul=_rounded(grouped_matmul.reference),
    grouped_quantized_matmul=_rounded(grouped_quantized_matmul.reference),
    combine_experts=_rounded(combine_experts.reference),
    quantized_linear=_rounded(quantized_linear.reference),
    sample=lambda logits_RV, draws: sample.reference(logits_RV, draws).to(logits_RV.device),
)
