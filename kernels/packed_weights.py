"""What weights have in common that are packed while they are loaded: `kernels.panels` and `kernels.int8_linear`."""

from abc import ABC, abstractmethod
from typing import Self

import torch


class PackedWeights(ABC):
    """The weights of one product, or of several of one shape (experts), one after the other."""

    def __init__(self, num_outputs: int, depth: int, *, num_experts: int = 1) -> None:
        self.num_outputs, self.depth, self.num_experts = num_outputs, depth, num_experts

    @classmethod
    def of(cls, w_NK: torch.Tensor) -> Self:
        """One whole matrix."""
        packed = cls(*w_NK.shape)
        packed.put(w_NK)
        return packed

    @abstractmethod
    def put(self, w_NK: torch.Tensor, *, start: int = 0, expert: int = 0) -> None:
        """Takes rows as outputs `start` and those after it. Raises `ValueError`."""

    def check_rows(self, w_NK: torch.Tensor, *, start: int) -> None:
        """Raises `ValueError` for rows that have no place as outputs `start` and those after it."""
        num_rows, depth = w_NK.shape
        if depth != self.depth or not 0 <= start <= self.num_outputs - num_rows:
            raise ValueError(
                f"outputs {start} to {start + num_rows} of {depth} inputs have no place in"
                f" {[self.num_outputs, self.depth]}"
            )
