"""Random checkpoints for measurements: the shape is real, the weights are noise."""

from pathlib import Path
from shutil import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "demo"


def write_random_model(
    directory: Path,
    *,
    hidden_size: int,
    num_layers: int,
    num_kv_heads: int | None = None,
    max_positions: int = 4096,
) -> Path:
    """A Llama with the demo model's tokenizer, fp32; heads of 64, usually four to a KV head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2560,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=num_kv_heads or max(hidden_size // 256, 1),
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(DEMO_MODEL / name, directory / name)
    return directory
