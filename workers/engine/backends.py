"""What computes the layers and draws the tokens on a device, by name, imported when it is chosen."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from workers.engine.draws import StepDraws
from workers.model.config import ModelConfig
from workers.model.kv_pages import KvPages
from workers.model.transformer import Transformer
from workers.model.weights import ModelWeights


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    transformer: Transformer
    sample: Callable[[torch.Tensor, StepDraws], torch.Tensor]


def _triton(config: ModelConfig, weights: ModelWeights, pages: KvPages, max_model_len: int) -> Backend:
    """The kernels of a GPU; on a CPU only as Triton interprets them."""
    from workers.model.gpu_kernels import TRITON
    from workers.model.gpu_operations import gpu_transformer

    transformer = gpu_transformer(config, weights, pages=pages, max_model_len=max_model_len, kernels=TRITON)
    return Backend(transformer=transformer, sample=TRITON.sample)


def _reference(config: ModelConfig, weights: ModelWeights, pages: KvPages, max_model_len: int) -> Backend:
    """The formulas of those kernels in plain torch, on any device, slowly: their oracle."""
    from workers.model.gpu_kernels import REFERENCE
    from workers.model.gpu_operations import gpu_transformer

    transformer = gpu_transformer(
        config, weights, pages=pages, max_model_len=max_model_len, kernels=REFERENCE
    )
    return Backend(transformer=transformer, sample=REFERENCE.sample)


BACKENDS = {"triton": _triton, "reference": _reference}
