"""A tiny random checkpoint with a tokenizer whose tokens are letters."""

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models

VOCAB_SIZE = 64


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of two layers."""
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(2)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=256, initializer_range=0.4, eos_token_id=[1, 2],
    )  # fmt: skip
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(path)
    tokenizer = Tokenizer(
        models.WordLevel({chr(48 + token): token for token in range(VOCAB_SIZE)}, unk_token="0")
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))
    return path
