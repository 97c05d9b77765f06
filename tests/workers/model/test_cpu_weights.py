"""Which layout the matrices of a model have for the kernels of a CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kernels.int8_linear import Int8Weights
from kernels.panels import Panels
from workers.model.checkpoint import Checkpoint
from workers.model.config import load_config
from workers.model.cpu_weights import load_cpu_weights
from workers.model.weights import ModelWeights, MoeMlp

Checkpoints = Callable[[str], tuple[Any, Path]]


def load(path: Path, *, dtype: torch.dtype = torch.float32, quantize: str = "none") -> ModelWeights:
    return load_cpu_weights(Checkpoint(path), load_config(path), dtype=dtype, quantize=quantize)


def test_a_tied_embedding_in_fp32_is_the_output_matrix_and_not_a_copy(checkpoint_of: Checkpoints) -> None:
    oracle, path = checkpoint_of("qwen3")
    weights, tokens = load(path), torch.tensor([3, 210, 0, 64, 3])
    assert weights.embedding_VD is weights.lm_head.weight
    assert torch.equal(weights.embedding_VD[tokens], oracle.model.embed_tokens.weight[tokens])


def test_a_tied_embedding_stays_whole_where_the_output_matrix_is_int8(checkpoint_of: Checkpoints) -> None:
    weights = load(checkpoint_of("qwen3")[1], quantize="int8")
    assert isinstance(weights.embedding_VD, torch.Tensor)
    assert isinstance(weights.lm_head.weight, Int8Weights)


def test_routers_stay_whole_where_experts_are_int8(checkpoint_of: Checkpoints) -> None:
    mlp = load(checkpoint_of("qwen3_moe")[1], quantize="int8").layers[0].mlp
    assert isinstance(mlp, MoeMlp)
    assert isinstance(mlp.router.weight, Panels)
    assert isinstance(mlp.down_EDI, Int8Weights)


def test_bfloat16_is_left_to_torch(checkpoint_of: Checkpoints) -> None:
    weights = load(checkpoint_of("llama")[1], dtype=torch.bfloat16)
    assert isinstance(weights.layers[0].qkv.weight, torch.Tensor)
