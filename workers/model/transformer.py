"""One decoder-only transformer for every family: the config says what a layer has.

T tokens of the step (all rows end to end), R rows, V vocabulary, D hidden, H query heads, G key/value heads,
C head dimension, N = (H + 2G) C, P pages, B tokens per page, L longest page list, S rows that sample.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from kernels.expert_mlp import expert_mlp
from kernels.paged_attention import paged_attention
from kernels.prefill_attention import prefill_attention
from kernels.rms_norm import add_rms_norm_, rms_norm
from kernels.rotary import rotate_and_store_
from kernels.route_experts import route_experts
from kernels.silu_mul import silu_mul
from workers.model.config import ModelConfig
from workers.model.rope import cos_sin_tables
from workers.model.weights import DenseMlp, LayerWeights, Linear, ModelWeights, MoeMlp


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A row of more than one token: tokens start..stop-1 of the step, after `num_prefix` tokens in `prefix_pages`."""

    start: int
    stop: int
    num_prefix: int
    prefix_pages: torch.Tensor  # int64 page ids


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """The tokens of a step: first those of the rows with one token, then the chunks."""

    token_ids_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    slots_T: torch.Tensor  # int64: page * B + place, where the token's key and value go
    table_RL: torch.Tensor  # int32 page ids of the R one-token rows
    lengths_R: torch.Tensor  # int32: tokens of context with the new one
    chunks: tuple[Chunk, ...]
    sampled_S: torch.Tensor  # int64: the tokens whose logits are wanted, in the order they are wanted

    @property
    def num_decodes(self) -> int:
        return len(self.lengths_R)


class Transformer:
    """The weights of one model and the buffers to run it; not to be used by two threads at once."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, *, max_model_len: int) -> None:
        self.config = config
        self._weights = weights
        self._scale = config.head_dim**-0.5
        self._cos_XF, self._sin_XF = cos_sin_tables(
            config.rope, head_dim=config.head_dim, num_positions=max_model_len
        )

    @torch.inference_mode()
    def forward(
        self,
        batch: TokenBatch,
        pages_LP2GBC: torch.Tensor,
        *,
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Logits [S, V] in fp32. Writes keys and values to their slots; `on_layer(l)` follows those of layer l."""
        eps = self.config.rms_norm_eps
        residual_TD = self._weights.embedding_VD[batch.token_ids_T]
        delta_TD: torch.Tensor | None = None
        for number, layer in enumerate(self._weights.layers):
            x_TD = _next_norm(residual_TD, delta_TD, layer.attention_norm_D, eps)
            delta_TD = self._attention(x_TD, layer, batch, pages_LP2GBC[number], number)
            if on_layer is not None:
                on_layer(number)
            x_TD = _next_norm(residual_TD, delta_TD, layer.mlp_norm_D, eps)
            delta_TD = _mlp(x_TD, layer.mlp)
        assert delta_TD is not None
        last_SD = residual_TD[batch.sampled_S] + delta_TD[batch.sampled_S]
        last_SD = rms_norm(last_SD, self._weights.final_norm_D, eps=eps)
        return _linear(last_SD, self._weights.lm_head).float()

    def _attention(
        self,
        x_TD: torch.Tensor,
        layer: LayerWeights,
        batch: TokenBatch,
        pages_P2GBC: torch.Tensor,
        number: int,
    ) -> torch.Tensor:
        config, window = self.config, self.config.layers[number].window
        qkv_TN = _linear(x_TD, layer.qkv)
        norms = (
            (layer.q_norm_C, layer.k_norm_C)
            if layer.q_norm_C is not None and layer.k_norm_C is not None
            else None
        )
        rotate_and_store_(
            qkv_TN, pages_P2GBC, positions_T=batch.positions_T, slots_T=batch.slots_T,
            cos_XF=self._cos_XF, sin_XF=self._sin_XF, norms=norms, eps=config.rms_norm_eps,
        )  # fmt: skip
        heads_TMC = qkv_TN.view(len(qkv_TN), -1, config.head_dim)
        q_THC, k_TGC, v_TGC = heads_TMC.split(
            [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1
        )
        out_THC = torch.empty_like(q_THC, memory_format=torch.contiguous_format)
        if batch.num_decodes:
            out_THC[: batch.num_decodes], _ = paged_attention(
                q_THC[: batch.num_decodes], pages_P2GBC, table_RL=batch.table_RL, lengths_R=batch.lengths_R,
                window=window, scale=self._scale,
            )  # fmt: skip
        for chunk in batch.chunks:
            span = slice(chunk.start, chunk.stop)
            out_THC[span], _ = prefill_attention(
                q_THC[span], k_TGC[span], v_TGC[span], pages_P2GBC, prefix_pages=chunk.prefix_pages,
                num_prefix=chunk.num_prefix, window=window, scale=self._scale,
            )  # fmt: skip
        return _linear(out_THC.flatten(1), layer.output)


def _next_norm(
    residual_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor, eps: float
) -> torch.Tensor:
    """Adds what the last block computed to the residual stream, in place, and returns the norm of the sum."""
    if delta_TD is None:
        return rms_norm(residual_TD, weight_D, eps=eps)
    return add_rms_norm_(residual_TD, delta_TD, weight_D, eps=eps)


def _mlp(x_TD: torch.Tensor, mlp: DenseMlp | MoeMlp) -> torch.Tensor:
    if isinstance(mlp, DenseMlp):
        return _linear(silu_mul(_linear(x_TD, mlp.gate_up)), mlp.down)
    weights_TK, experts_TK = route_experts(
        _linear(x_TD, mlp.router), num_active=mlp.config.num_active, normalizes=mlp.config.normalizes
    )
    return expert_mlp(x_TD, mlp.gate_up_EWD, mlp.down_EDI, weights_TK=weights_TK, experts_TK=experts_TK)


def _linear(x_TI: torch.Tensor, weights: Linear) -> torch.Tensor:
    return linear(x_TI, weights.weight, weights.bias)
