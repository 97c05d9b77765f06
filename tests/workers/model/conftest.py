"""Random checkpoints of every family, written by transformers, which is also the oracle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

_SIZES: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "eos_token_id": 2,
}  # fmt: skip
_MOE = {"moe_intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 16}


def _rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


_LLAMA3 = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=128)

# name: (family, what differs from the sizes above)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_one_head_group": ("Llama", {"num_key_value_heads": 6}),
    "llama_multi_query": ("Llama", {"num_key_value_heads": 1}),
    "llama_bias_tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama_wide_heads": ("Llama", {"head_dim": 32}),
    "llama_rope_llama3": ("Llama", _LLAMA3),
    "llama_rope_linear": ("Llama", _rope("linear", factor=4.0)),
    "llama_rope_yarn": ("Llama", _YARN),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_window": ("Mistral", {"sliding_window": 20}),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_bias": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral_window": ("Mixtral", {"num_local_experts": 4, "sliding_window": 7}),
    "qwen3_moe": ("Qwen3Moe", {**_MOE, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen3_moe_raw_weights": ("Qwen3Moe", {**_MOE, "norm_topk_prob": False}),
    "qwen3_moe_dense_layer": ("Qwen3Moe", {**_MOE, "norm_topk_prob": True, "mlp_only_layers": [1]}),
}


def make_oracle(name: str) -> Any:
    """A random model of the family, in fp32, with norms and biases that are not trivial."""
    family, changes = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**{**_SIZES, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(11)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith(".bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """name -> (oracle, directory of its checkpoint in several shards), made once."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            oracle = make_oracle(name)
            oracle.save_pretrained(directory, max_shard_size="60KB")
            made[name] = oracle, directory
        return made[name]

    return make


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)
