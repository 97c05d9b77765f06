"""Small models of noise, one of each kind that the layers tell apart: what a checkpoint holds, without its files."""

import zlib
from functools import partial
from typing import Any

import torch

from workers.engine.offline_engine import Model
from workers.model.config import parse_config
from workers.model.quantize import quantized_product
from workers.model.weights import load_weights

SIZES: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama_bias": {"attention_bias": True, "mlp_bias": True},
    "llama_wide": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
    "mistral_window": {"architectures": ["MistralForCausalLM"], "sliding_window": 20},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16, "moe_intermediate_size": 40, "num_experts": 6,
        "num_experts_per_tok": 2, "norm_topk_prob": True,
    },
    "qwen3_moe_wide": {
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 128, "head_dim": 64, "num_attention_heads": 2,
        "moe_intermediate_size": 128, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True,
    },
}  # fmt: skip


class Noise:
    """Tensors that depend on their name alone; strong enough that the likeliest token stands out."""

    def has(self, name: str) -> bool:
        return True

    def copy_into(self, target: torch.Tensor, name: str) -> None:
        noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        target.copy_(1 + 0.1 * noise if "norm" in name else 0.4 * noise)


class Recorded(Noise):
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def copy_into(self, target: torch.Tensor, name: str) -> None:
        super().copy_into(target, name)
        self.tensors[name] = target.clone()


def named_noise(family: str) -> dict[str, torch.Tensor]:
    """The tensors of the model as a file has them."""
    recorded = Recorded()
    load_weights(recorded, parse_config(SIZES | FAMILIES[family]), dtype=torch.float32)
    return recorded.tensors


def make_model(
    family: str, *, device: str, dtype: torch.dtype = torch.float32, quantize: str | None = None
) -> Model:
    config, noise = parse_config(SIZES | FAMILIES[family]), Noise()
    stored = None if quantize is None else partial(quantized_product, noise, quantize)
    weights = load_weights(noise, config, dtype=dtype, device=torch.device(device), stored=stored)
    return Model(config=config, weights=weights, eos_token_ids=frozenset([2]))
