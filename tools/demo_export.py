"""Writes the demo model in the Hugging Face format."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from tools.demo_network import Network
from tools.demo_tokenizer import write_tokenizer


def write_model(network: Network, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes weights as bfloat16, the configuration and the tokenizer into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(hugging_face_weights(network), str(directory / "model.safetensors"), metadata={"format": "pt"})
    generation = {
        "bos_token_id": 0,
        "eos_token_id": 4,
        "pad_token_id": 0,
        "do_sample": False,
        "max_new_tokens": 256,
    }
    for name, content in (
        ("config.json", network.shape.hugging_face()),
        ("generation_config.json", generation),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(tokenizer, directory)


def hugging_face_weights(network: Network) -> dict[str, torch.Tensor]:
    """The weights under the names of Qwen3MoeForCausalLM, a matrix per expert."""
    found: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": network.embedding,
        "model.norm.weight": network.norm.weight,
    }
    for index, layer in enumerate(network.blocks()):
        lead = f"model.layers.{index}"
        found[f"{lead}.input_layernorm.weight"] = layer.input_norm.weight
        found[f"{lead}.post_attention_layernorm.weight"] = layer.post_norm.weight
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{lead}.self_attn.{name}.weight"] = getattr(layer.attention, name)
        for name in ("q_norm", "k_norm"):
            found[f"{lead}.self_attn.{name}.weight"] = getattr(layer.attention, name).weight
        found[f"{lead}.mlp.gate.weight"] = layer.experts.router
        for expert, (gate_up, down) in enumerate(zip(layer.experts.gate_up, layer.experts.down, strict=True)):
            gate, up = gate_up.chunk(2)
            found[f"{lead}.mlp.experts.{expert}.gate_proj.weight"] = gate
            found[f"{lead}.mlp.experts.{expert}.up_proj.weight"] = up
            found[f"{lead}.mlp.experts.{expert}.down_proj.weight"] = down
    return {name: value.detach().cpu().to(torch.bfloat16).contiguous() for name, value in found.items()}
