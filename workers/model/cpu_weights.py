"""Weights as the kernels of a CPU multiply them: in panels, in fp32 or as int8; those of bfloat16 are torch's."""

from collections.abc import Callable

import torch

from kernels.int8_linear import Int8Weights
from kernels.panels import Panels
from workers.model.config import ModelConfig
from workers.model.weights import ModelWeights, Tensors, load_weights


def load_cpu_weights(
    checkpoint: Tensors,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    quantize: str = "none",
    on_progress: Callable[[float], None] = lambda share: None,
) -> ModelWeights:
    """`quantize` is none or int8. Raises `CheckpointError`."""
    whole = Panels if dtype == torch.float32 else None
    packed = Int8Weights if quantize == "int8" else whole
    return load_weights(checkpoint, config, dtype=dtype, packed=packed, whole=whole, on_progress=on_progress)
