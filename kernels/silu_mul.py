"""The gate of a MLP: y = silu(gate) * up, silu(z) = z / (1 + exp(-z)).

gate_up_TW [T, 2I] holds all I gates, then all I ups; y is [T, I].
"""

import torch


def reference(gate_up_TW: torch.Tensor) -> torch.Tensor:
    gate_TI, up_TI = gate_up_TW.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_TI) * up_TI


def silu_mul(gate_up_TW: torch.Tensor) -> torch.Tensor:
    return reference(gate_up_TW)
