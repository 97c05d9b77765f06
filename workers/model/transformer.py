"""One decoder-only transformer for every family: the config says what a layer has.

T tokens of the step (all rows end to end), V vocabulary, D hidden, H query heads, G key/value heads, C head dimension,
N = (H + 2G) C, P pages, B tokens per page, L layers, S rows that sample.
"""

from collections.abc import Callable

import torch

from kernels.expert_mlp import expert_mlp
from kernels.int8_linear import Int8Weights, int8_linear
from kernels.linear import linear
from kernels.paged_attention import paged_attention
from kernels.prefill_attention import prefill_attention
from kernels.rms_norm import add_rms_norm_, rms_norm
from kernels.rotary import Rotation, rotate_and_store_
from kernels.route_experts import route_experts
from kernels.silu_mul import silu_mul
from workers.model.config import ModelConfig
from workers.model.program import MAX_TOKENS, LayerProgram
from workers.model.rope import cos_sin_tables
from workers.model.token_batch import TokenBatch
from workers.model.weights import DenseMlp, LayerWeights, Linear, ModelWeights, MoeMlp


class Transformer:
    """The weights of a model and the pages they run on; not to be used by two threads at once.

    Steps of few tokens run as a compiled program, others (and bfloat16) operation by operation.
    """

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, *, pages_LP2GBC: torch.Tensor, max_model_len: int
    ) -> None:
        self.config = config
        self._weights = weights
        self._pages_LP2GBC = pages_LP2GBC
        cos_XF, sin_XF = cos_sin_tables(config.rope, head_dim=config.head_dim, num_positions=max_model_len)
        self._rotations = [
            Rotation(
                cos_XF=cos_XF, sin_XF=sin_XF, q_norm_C=layer.q_norm_C, k_norm_C=layer.k_norm_C,
                eps=config.rms_norm_eps,
            )
            for layer in weights.layers
        ]  # fmt: skip
        self._program = (
            LayerProgram(config, weights, self._rotations, pages_LP2GBC)
            if pages_LP2GBC.dtype == torch.float32
            else None
        )

    @torch.inference_mode()
    def forward(self, batch: TokenBatch, *, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Logits [S, V] in fp32. Writes keys and values to their slots; `on_layer(l)` follows those of layer l."""
        embedded_TD = self._weights.embedding_VD[batch.token_ids_T]
        if self._program is not None and len(embedded_TD) <= MAX_TOKENS:
            hidden_SD = self._program.run(embedded_TD, batch, on_layer=on_layer)[batch.sampled_S]
        else:
            hidden_SD = self._layers(embedded_TD, batch, on_layer)
        last_SD = rms_norm(hidden_SD, self._weights.final_norm_D, eps=self.config.rms_norm_eps)
        return _linear(last_SD, self._weights.lm_head).float()

    def _layers(
        self, residual_TD: torch.Tensor, batch: TokenBatch, on_layer: Callable[[int], None] | None
    ) -> torch.Tensor:
        """The residual stream [S, D] after all layers, operation by operation."""
        eps = self.config.rms_norm_eps
        delta_TD: torch.Tensor | None = None
        for number, layer in enumerate(self._weights.layers):
            x_TD = _next_norm(residual_TD, delta_TD, layer.attention_norm_D, eps)
            heads_TX = self._attention(x_TD, layer, batch, number)
            if on_layer is not None:
                on_layer(number)
            if number == len(self._weights.layers) - 1:
                # All keys and values are written: from here on only the tokens that sample matter.
                heads_TX, residual_TD = heads_TX[batch.sampled_S], residual_TD[batch.sampled_S]
            delta_TD = _linear(heads_TX, layer.output)
            x_TD = _next_norm(residual_TD, delta_TD, layer.mlp_norm_D, eps)
            delta_TD = _mlp(x_TD, layer.mlp)
        assert delta_TD is not None
        return residual_TD + delta_TD

    def _attention(
        self, x_TD: torch.Tensor, layer: LayerWeights, batch: TokenBatch, number: int
    ) -> torch.Tensor:
        """What the heads read [T, H C]; writes keys and values to their slots."""
        config, window, scale = self.config, self.config.layers[number].window, self.config.head_dim**-0.5
        pages_P2GBC = self._pages_LP2GBC[number]
        qkv_TN = _linear(x_TD, layer.qkv)
        rotate_and_store_(
            qkv_TN, pages_P2GBC, self._rotations[number], positions_T=batch.positions_T, slots_T=batch.slots_T
        )
        heads_TMC = qkv_TN.view(len(qkv_TN), -1, config.head_dim)
        q_THC = heads_TMC[:, : config.num_heads]
        # In fp32 one kernel reads all contexts, so that a token comes out the same whatever it is computed with.
        num_singles = len(q_THC) if q_THC.dtype == torch.float32 else batch.num_singles
        singles = slice(0, num_singles)
        out_THC, _ = paged_attention(
            q_THC[singles], pages_P2GBC, table_RL=batch.table_RL, rows_T=batch.rows_T[singles],
            lengths_T=batch.positions_T[singles] + 1, window=window, scale=scale,
        )  # fmt: skip
        if num_singles < len(q_THC):
            k_TGC, v_TGC = heads_TMC[:, config.num_heads :].chunk(2, dim=1)
            outs_THC = [out_THC]
            for chunk in batch.chunks:
                span = slice(chunk.start, chunk.stop)
                out_THC, _ = prefill_attention(
                    q_THC[span], k_TGC[span], v_TGC[span], pages_P2GBC, prefix_pages=chunk.pages,
                    num_prefix=chunk.num_prefix, window=window, scale=scale,
                )  # fmt: skip
                outs_THC.append(out_THC)
            out_THC = torch.cat(outs_THC)
        return out_THC.flatten(1)


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
    if isinstance(weights.weight, Int8Weights):
        return int8_linear(x_TI, weights.weight, weights.bias)
    return linear(x_TI, weights.weight, weights.bias)
