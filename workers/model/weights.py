"""A checkpoint's tensors, checked and laid out for computing: q, k and v in one matrix, gate and up in another.

V vocabulary, D hidden, H query heads, G key/value heads, C head dimension, I MLP width, E experts, N = (H + 2G) C.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kernels.packed_weights import PackedWeights
from workers.errors import CheckpointError
from workers.model.config import ModelConfig, MoeConfig

# A tensor [out, in], or [experts, out, in]; or what the kernels of a device keep of one: `Panels` of `kernels.panels`,
# or quantized `Int8Weights` of `kernels.int8_linear`, `QuantizedWeight` of `kernels.gpu.quantized_weight`. None is
# named here, as no machine has the packages of all.
Weight = Any
# What a checkpoint has quantised, or what is quantised as it is read, of the matrices of a product (the rows of each
# name, for each expert) of so many inputs, to be multiplied as it is; None where it is to be read as whole weights.
Stored = Callable[[Sequence[Mapping[str, int]], int, torch.device], Weight | None]


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x weight^T + bias; bias [out]."""

    weight: Weight
    bias: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseMlp:
    gate_up: Linear  # [2I, D]: all gate rows, then all up rows
    down: Linear  # [D, I]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeMlp:
    config: MoeConfig
    router: Linear  # [E, D]
    gate_up_EWD: Weight  # W = 2I: all gate rows, then all up rows
    down_EDI: Weight


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
    embedding_VD: Weight  # indexed by token
    layers: tuple[LayerWeights, ...]
    final_norm_D: torch.Tensor
    lm_head: Linear  # [V, D]; where the checkpoint ties them and nothing is quantized, the embedding itself


class Tensors(Protocol):
    """Where weights come from by name: a checkpoint, or noise."""

    def has(self, name: str) -> bool: ...

    def copy_into(self, target: torch.Tensor, name: str) -> None:
        """Raises `CheckpointError` for a tensor that is missing or of another shape."""
        ...


def load_weights(
    checkpoint: Tensors,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    packed: type[PackedWeights] | None = None,
    whole: type[PackedWeights] | None = None,
    stored: Stored | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - a value like any other
    on_progress: Callable[[float], None] = lambda share: None,
) -> ModelWeights:
    """All weights of the model in `dtype` on `device`, merged for batched products. Raises `CheckpointError`.

    With `packed`, such as `Int8Weights`, those of all products become one of these while they are read, but for the
    routers, which are small and where a hair decides between experts: they become one of `whole`. The embedding, of
    which a step reads a row, and norms stay as they are (docs/performance.md), unless lm_head is the embedding and
    whole: then it is the one copy. What `stored` has is taken as it is.
    `on_progress` is called after every layer with the share of layers that are loaded.
    """
    loader = _Loader(checkpoint, config, dtype, device, packed, whole, stored)
    tied = config.tied_embeddings or not checkpoint.has("lm_head.weight")
    if tied and not config.tied_embeddings:
        raise CheckpointError("tensor lm_head.weight is missing and config.json does not tie the embeddings")
    embedding, lm_head = loader.ends(tied=tied)
    return ModelWeights(
        embedding_VD=embedding,
        layers=tuple(_layers(loader, len(config.layers), on_progress)),
        final_norm_D=loader.tensor("model.norm.weight", config.hidden_size),
        lm_head=lm_head,
    )


def _layers(
    loader: "_Loader", num_layers: int, on_progress: Callable[[float], None]
) -> Iterator[LayerWeights]:
    for number in range(num_layers):
        yield loader.layer(number)
        on_progress((number + 1) / num_layers)


class _Loader:
    def __init__(
        self,
        checkpoint: Tensors,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        packed: type[PackedWeights] | None,
        whole: type[PackedWeights] | None,
        stored: Stored | None,
    ) -> None:
        self._checkpoint, self._config, self._dtype, self._device = checkpoint, config, dtype, device
        self._packed, self._whole, self._stored = packed, whole, stored

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        target = self._empty(*shape)
        self._checkpoint.copy_into(target, name)
        return target

    def linear(self, names: Mapping[str, int], num_inputs: int, *, bias: bool) -> Linear:
        """One matrix of the rows of all `names`, each with its number of rows."""
        weight = self._matrices([names], num_inputs)
        added = torch.cat([self.tensor(f"{name}.bias", names[name]) for name in names]) if bias else None
        return Linear(weight[0] if isinstance(weight, torch.Tensor) else weight, added)

    def ends(self, *, tied: bool) -> tuple[Weight, Linear]:
        """(embedding, lm_head); tied they are one, or where lm_head is quantized, two."""
        sizes = self._config.vocab_size, self._config.hidden_size
        embedding_VD = self.tensor("model.embed_tokens.weight", *sizes)
        if not tied:
            return embedding_VD, self.linear({"lm_head": sizes[0]}, sizes[1], bias=False)
        lm_head = _filled(self._packed, embedding_VD)
        return (lm_head if self._packed is self._whole else embedding_VD), Linear(lm_head)

    def _matrices(self, names_E: Sequence[Mapping[str, int]], num_inputs: int) -> Weight:
        """For each expert one matrix, quantized as it is read: at no time are there two copies of all of it."""
        if self._stored is not None:
            stored = self._stored(names_E, num_inputs, self._device)
            if stored is not None:
                return stored
        num_outputs = sum(names_E[0].values())
        if self._packed is not None:
            packed = self._packed(num_outputs, num_inputs, num_experts=len(names_E))
            for expert, start, name, num_rows in _places(names_E):
                packed.put(self.tensor(name, num_rows, num_inputs), start=start, expert=expert)
            return packed
        weight_ENK = self._empty(len(names_E), num_outputs, num_inputs)
        for expert, start, name, num_rows in _places(names_E):
            self._checkpoint.copy_into(weight_ENK[expert, start : start + num_rows], name)
        return weight_ENK

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
        experts = [f"{block}.experts.{expert}" for expert in range(moe.num_experts)]
        gate_up = [{f"{name}.{gate}": width, f"{name}.{up}": width} for name in experts]
        router = self.tensor(f"{block}.gate.weight", moe.num_experts, hidden)
        return MoeMlp(
            config=moe,
            router=Linear(_filled(self._whole, router)),
            gate_up_EWD=self._matrices(gate_up, hidden),
            down_EDI=self._matrices([{f"{name}.{down}": hidden} for name in experts], width),
        )


def _filled(kind: type[PackedWeights] | None, weight_NK: torch.Tensor) -> Weight:
    return weight_NK if kind is None else kind.of(weight_NK)


def _places(names_E: Sequence[Mapping[str, int]]) -> Iterator[tuple[int, int, str, int]]:
    """(expert, its first row, tensor, number of rows) of all weights."""
    for expert, names in enumerate(names_E):
        start = 0
        for name, num_rows in names.items():
            yield expert, start, f"{name}.weight", num_rows
            start += num_rows
