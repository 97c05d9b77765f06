"""Checkpoints that AWQ or GPTQ quantised: where a weight is asked for, the one that its numbers stand for."""

import hashlib
from pathlib import Path

import torch

from workers.model.checkpoint import Checkpoint
from workers.model.config import load_stored_quantization
from workers.model.grouped_numbers import GroupedNumbers, PackedMatrix, read_grouped
from workers.model.stored_quantization import StoredQuantization

_WEIGHT, _PACKED = ".weight", ".qweight"


def open_checkpoint(model_path: Path) -> Checkpoint:
    """Raises `CheckpointError`."""
    stored = load_stored_quantization(model_path)
    return Checkpoint(model_path) if stored is None else QuantizedCheckpoint(model_path, stored)


class QuantizedCheckpoint(Checkpoint):
    """One like any other to those who want whole weights; what it leaves whole is read as it is."""

    def __init__(self, model_path: Path, stored: StoredQuantization) -> None:
        super().__init__(model_path)
        self._stored = stored

    def has(self, name: str) -> bool:
        return super().has(name) or self.is_packed(name.removesuffix(_WEIGHT))

    def is_packed(self, matrix_name: str) -> bool:
        return super().has(matrix_name + _PACKED)

    def copy_into(self, target: torch.Tensor, name: str) -> None:
        matrix_name = name.removesuffix(_WEIGHT)
        if target.ndim == 2 and self.is_packed(matrix_name):
            num_outputs, num_inputs = target.shape
            matrix = PackedMatrix(name=matrix_name, num_outputs=num_outputs, num_inputs=num_inputs)
            target.copy_(self.grouped(matrix, target.device).whole())
        else:
            super().copy_into(target, name)

    def grouped(self, matrix: PackedMatrix, device: torch.device) -> GroupedNumbers:
        return read_grouped(self, matrix, self._stored, device)

    def digest(self) -> bytes:
        """Of the same bytes another format makes other weights."""
        return hashlib.sha256(super().digest() + repr(self._stored).encode()).digest()
