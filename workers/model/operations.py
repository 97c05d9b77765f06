"""What a transformer computes with: the seam between the layers and the kernels of a device.

Letters as in `workers.model.transformer`.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from workers.model.token_batch import TokenBatch
from workers.model.weights import Linear, MoeMlp


class Operations(Protocol):
    """The operations of one model on its pages. Only `add_norm_` and `attend` change what they are given."""

    def norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor: ...

    def add_norm_(
        self, residual_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor
    ) -> torch.Tensor:
        """Adds delta to the residual stream, in place, and returns the norm of the sum."""
        ...

    def linear(self, x_TI: torch.Tensor, weights: Linear) -> torch.Tensor: ...

    def attend(self, qkv_TN: torch.Tensor, layer: int, batch: TokenBatch) -> torch.Tensor:
        """What the heads read [T, H C], after keys and values were written to their slots. Destroys the queries."""
        ...

    def silu_mul(self, gate_up_TW: torch.Tensor) -> torch.Tensor: ...

    def experts(self, x_TD: torch.Tensor, mlp: MoeMlp) -> torch.Tensor: ...


class Program(Protocol):
    """All layers at once, for steps of up to `max_tokens` tokens."""

    max_tokens: int

    def run(
        self, embedded_TD: torch.Tensor, batch: TokenBatch, *, on_layer: Callable[[int], None] | None
    ) -> torch.Tensor:
        """The residual stream [T, D] after all layers: a view that the next run overwrites."""
        ...
