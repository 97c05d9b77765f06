"""What computes the layers and draws the tokens, by name.

A backend is imported when it is chosen: a bare GPU machine has no numba, and serving on a CPU has no Triton.
"""

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


def _numba(config: ModelConfig, weights: ModelWeights, pages: KvPages, max_model_len: int) -> Backend:
    """The kernels that serve on a CPU."""
    from kernels.sample import Draws, sample
    from workers.model.cpu_operations import cpu_transformer

    def draw(logits_RV: torch.Tensor, draws: StepDraws) -> torch.Tensor:
        token_R: torch.Tensor = sample(
            logits_RV,
            Draws(
                temperature=draws.temperature.double().numpy(),
                top_k=draws.top_k.numpy(),
                top_p=draws.top_p.numpy(),
                min_p=draws.min_p.numpy(),
                uniform=draws.uniform.numpy(),
            ),
        )
        return token_R

    transformer = cpu_transformer(
        config, weights, pages_LP2GBC=pages.pages_LP2GBC, max_model_len=max_model_len
    )
    return Backend(transformer=transformer, sample=draw)


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


BACKENDS = {"numba": _numba, "triton": _triton, "reference": _reference}
