"""Muon for the matrices inside the layers, AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) makes the momentum of a matrix nearly
orthogonal by a Newton-Schulz iteration; small models then need far fewer tokens until attention learns to
copy.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

ITERATIONS = 5
COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # a quintic that lifts small singular values quickly, from the same source


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates for parameters of shape [..., rows, columns]."""

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Moves every parameter by its gradient, which must be there. `closure` is the base class's and unused."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                momentum = state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                update = orthogonal(param.grad.lerp(momentum, group["momentum"]))
                scale = max(1.0, param.shape[-2] / param.shape[-1]) ** 0.5
                param.mul_(1 - group["lr"] * 0.01)
                param.add_(update.to(param.dtype), alpha=-group["lr"] * scale)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrix of each of x [..., rows, columns], roughly, in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(torch.bfloat16)
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    result: torch.Tensor = y.mT if tall else y
    return result
