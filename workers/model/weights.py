"""A checkpoint's tensors, checked and laid out for computing: q, k and v in one matrix, gate and up in another.

V vocabulary, D hidden, H query heads, G key/value heads, C head dimension, I MLP width, E experts, N = (H + 2G) C.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from workers.errors import CheckpointError
from workers.model.checkpoint import Checkpoint
from workers.model.config import ModelConfig, MoeConfig


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x weight^T + bias; weight [out, in], bias [out]."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseMlp:
    gate_up: Linear  # [2I, D]: all gate rows, then all up rows
    down: Linear  # [D, I]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeMlp:
    config: MoeConfig
    router: Linear  # [E, D]
    gate_up_EWD: torch.Tensor  # W = 2I: all gate rows, then all up rows
    down_EDI: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    attention_norm_D: torch.Tensor
    qkv: Linear  # [N, D]: queries, keys, values
    q_norm_C: torch.Tensor | None
    k_norm_C: torch.Tensor | None
    output: Linear  # [D, H C]
    mlp_norm_D: torch.Tensor
    mlp: DenseMlp | MoeMlp


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelWeights:
    embedding_VD: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm_D: torch.Tensor
    lm_head: Linear  # [V, D]; shares memory with the embedding when the checkpoint ties them


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    on_progress: Callable[[float], None] = lambda share: None,
) -> ModelWeights:
    """All weights of the model in `dtype`, merged for batched products. Raises `CheckpointError`.

    `on_progress` is called after every layer with the share of layers that are loaded.
    """
    loader = _Loader(checkpoint, config, dtype)
    embedding = loader.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    tied = config.tied_embeddings or not checkpoint.has("lm_head.weight")
    if tied and not config.tied_embeddings:
        raise CheckpointError("tensor lm_head.weight is missing and config.json does not tie the embeddings")
    lm_head = embedding if tied else loader.tensor("lm_head.weight", config.vocab_size, config.hidden_size)
    return ModelWeights(
        embedding_VD=embedding,
        layers=tuple(_layers(loader, len(config.layers), on_progress)),
        final_norm_D=loader.tensor("model.norm.weight", config.hidden_size),
        lm_head=Linear(lm_head),
    )


def _layers(
    loader: "_Loader", num_layers: int, on_progress: Callable[[float], None]
) -> Iterator[LayerWeights]:
    for number in range(num_layers):
        yield loader.layer(number)
        on_progress((number + 1) / num_layers)


class _Loader:
    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype) -> None:
        self._checkpoint, self._config, self._dtype = checkpoint, config, dtype

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        target = torch.empty(shape, dtype=self._dtype)
        self._checkpoint.copy_into(target, name)
        return target

    def linear(self, names: Mapping[str, int], num_inputs: int, *, bias: bool) -> Linear:
        """One matrix of the rows of all `names`, each with its number of rows."""
        weight = torch.empty(sum(names.values()), num_inputs, dtype=self._dtype)
        added = torch.empty(weight.shape[0], dtype=self._dtype) if bias else None
        start = 0
        for name, num_rows in names.items():
            self._checkpoint.copy_into(weight[start : start + num_rows], f"{name}.weight")
            if added is not None:
                self._checkpoint.copy_into(added[start : start + num_rows], f"{name}.bias")
            start += num_rows
        return Linear(weight, added)

    def layer(self, number: int) -> LayerWeights:
        config, prefix = self._config, f"model.layers.{number}"
        attention = f"{prefix}.self_attn"
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv = {f"{attention}.q_proj": q_rows, f"{attention}.k_proj": kv_rows, f"{attention}.v_proj": kv_rows}
        output = {f"{attention}.o_proj": config.hidden_size}
        moe = config.layers[number].moe
        return LayerWeights(
            attention_norm_D=self.tensor(f"{prefix}.input_layernorm.weight", config.hidden_size),
            qkv=self.linear(qkv, config.hidden_size, bias=config.qkv_bias),
            q_norm_C=self.tensor(f"{attention}.q_norm.weight", config.head_dim) if config.qk_norm else None,
            k_norm_C=self.tensor(f"{attention}.k_norm.weight", config.head_dim) if config.qk_norm else None,
            output=self.linear(output, q_rows, bias=config.output_bias),
            mlp_norm_D=self.tensor(f"{prefix}.post_attention_layernorm.weight", config.hidden_size),
            mlp=self._dense(f"{prefix}.mlp") if moe is None else self._moe(prefix, moe),
        )

    def _dense(self, prefix: str) -> DenseMlp:
        config = self._config
        width = config.intermediate_size
        gate_up = {f"{prefix}.gate_proj": width, f"{prefix}.up_proj": width}
        return DenseMlp(
            gate_up=self.linear(gate_up, config.hidden_size, bias=config.mlp_bias),
            down=self.linear({f"{prefix}.down_proj": config.hidden_size}, width, bias=config.mlp_bias),
        )

    def _moe(self, prefix: str, moe: MoeConfig) -> MoeMlp:
        mixtral = moe.naming == "mixtral"
        block = f"{prefix}.block_sparse_moe" if mixtral else f"{prefix}.mlp"
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        hidden, width = self._config.hidden_size, moe.intermediate_size
        gate_up_EWD = torch.empty(moe.num_experts, 2 * width, hidden, dtype=self._dtype)
        down_EDI = torch.empty(moe.num_experts, hidden, width, dtype=self._dtype)
        for expert in range(moe.num_experts):
            name = f"{block}.experts.{expert}"
            self._checkpoint.copy_into(gate_up_EWD[expert, :width], f"{name}.{gate}.weight")
            self._checkpoint.copy_into(gate_up_EWD[expert, width:], f"{name}.{up}.weight")
            self._checkpoint.copy_into(down_EDI[expert], f"{name}.{down}.weight")
        router = self.linear({f"{block}.gate": moe.num_experts}, hidden, bias=False)
        return MoeMlp(config=moe, router=router, gate_up_EWD=gate_up_EWD, down_EDI=down_EDI)
