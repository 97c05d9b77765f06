"""Random models of every family, packed as AWQ and GPTQ do it, and transformers with what they stand for."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.packed_checkpoints import Packing, pack_all
from workers.compute_device import ComputeDevice
from workers.engine.backends import BACKENDS
from workers.engine.offline_engine import Model, load_model
from workers.engine.offline_settings import OfflineSettings
from workers.model.cpu_operations import cpu_transformer
from workers.model.kv_pages import allocate_pages
from workers.model.token_batch import Chunk, ChunkBounds, TokenBatch
from workers.model.weights import DenseMlp, MoeMlp

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_whole_words": ("Llama", {"vocab_size": 96}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "qwen3_tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}
MOE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 32, "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2},
    ),
}
PACKINGS = {
    "awq": Packing(method="awq"),
    "awq_64": Packing(method="awq", group_size=64),
    "gptq": Packing(),
    "gptq_v2": Packing(v2=True),
    "gptq_symmetric": Packing(symmetric=True),
    "gptq_acts_in_order": Packing(acts_in_order=True, group_size=32),
    "gptq_whole_rows": Packing(group_size=-1),
    "gptq_8_bits": Packing(bits=8, symmetric=True),
    "gptq_8_bits_acts_in_order": Packing(bits=8, symmetric=True, acts_in_order=True, group_size=64),
}  # fmt: skip
TOKENS = [5, 9, 60, 33, 7, 80, 12, 41, 41, 3, 25, 90, 66]


def make(path: Path, family: str, packing: Packing, **how: Any) -> Any:
    """Writes a random model, packed; returns the oracle with the weights that it stands for."""
    kind, changes = (FAMILIES | MOE)[family]
    torch.manual_seed(5)
    oracle = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**SIZES | changes)
    )
    oracle.eval().save_pretrained(path)
    file, meant = pack_all(load_file(path / "model.safetensors"), packing, **how)
    save_file(meant, path / "model.safetensors")
    oracle = type(oracle).from_pretrained(path)
    save_file(file, path / "model.safetensors")
    edit_config(path, quantization_config=packing.config())
    return oracle


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")


def load(path: Path, *, attention: str = "reference", **settings: Any) -> Model:
    given = OfflineSettings(compute=ComputeDevice(attention=attention), **settings)
    return load_model(path, given, on_progress=lambda share: None)


def logits(model: Model, tokens: Sequence[int], *, attention: str = "reference") -> torch.Tensor:
    """After the last token of a prompt."""
    pages = allocate_pages(
        model.config, num_pages=1, block=16, dtype=torch.float32, device=torch.device("cpu")
    )
    count = len(tokens)
    page = torch.zeros(1, 1, dtype=torch.int32)
    batch = TokenBatch(
        token_ids_T=torch.tensor(tokens), positions_T=torch.arange(count), slots_T=torch.arange(count),
        rows_T=torch.zeros(count, dtype=torch.int64), table_RL=page, num_singles=0,
        chunks=(Chunk(start=0, stop=count, num_prefix=0, pages=page[0]),), sampled_S=torch.tensor([count - 1]),
        chunk_bounds=ChunkBounds(starts=torch.tensor([0, count]), lengths_N=torch.tensor([count])),
    )  # fmt: skip
    if attention == "numba":
        transformer = cpu_transformer(
            model.config, model.weights, pages_LP2GBC=pages.pages_LP2GBC, max_model_len=64
        )
    else:
        transformer = BACKENDS[attention](model.config, model.weights, pages, 64).transformer
    return transformer.forward(batch)[0]


@torch.no_grad()
def assert_logits_are_the_oracles(model: Model, oracle: Any, *, attention: str = "reference") -> None:
    expected = oracle(torch.tensor([TOKENS])).logits[0, -1]
    torch.testing.assert_close(logits(model, TOKENS, attention=attention), expected, atol=1e-4, rtol=1e-4)


def products(model: Model) -> list[Any]:
    layers = model.weights.layers
    dense = [layer.mlp for layer in layers if isinstance(layer.mlp, DenseMlp)]
    return [
        linear.weight
        for linear in [
            *(linear for layer in layers for linear in (layer.qkv, layer.output)),
            *(linear for mlp in dense for linear in (mlp.gate_up, mlp.down)),
        ]
    ]


def experts(model: Model) -> list[Any]:
    mlps = [layer.mlp for layer in model.weights.layers if isinstance(layer.mlp, MoeMlp)]
    return [weight for mlp in mlps for weight in (mlp.gate_up_EWD, mlp.down_EDI)]
