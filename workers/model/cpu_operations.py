"""The operations of a transformer on the CPU, with the kernels in numba, and its program for steps of few tokens.

Letters as in `workers.model.transformer`.
"""

import torch

from kernels.expert_mlp import expert_mlp
from kernels.expert_mlp import reference as expert_mlp_reference
from kernels.int8_linear import Int8Weights, int8_linear
from kernels.linear import linear
from kernels.paged_attention import paged_attention
from kernels.panels import Panels
from kernels.prefill_attention import prefill_attention
from kernels.rms_norm import add_rms_norm_, rms_norm
from kernels.rotary import Rotation, rotate_and_store_
from kernels.route_experts import route_experts
from kernels.silu_mul import silu_mul
from workers.model.config import ModelConfig
from workers.model.program import LayerProgram
from workers.model.rope import cos_sin_tables
from workers.model.token_batch import TokenBatch
from workers.model.transformer import Transformer
from workers.model.weights import Linear, ModelWeights, MoeMlp


def cpu_transformer(
    config: ModelConfig, weights: ModelWeights, *, pages_LP2GBC: torch.Tensor, max_model_len: int
) -> Transformer:
    """On pages of fp32, or of bfloat16, for which there is no program."""
    cos_XF, sin_XF = cos_sin_tables(config.rope, head_dim=config.head_dim, num_positions=max_model_len)
    rotations = [
        Rotation(
            cos_XF=cos_XF, sin_XF=sin_XF, q_norm_C=layer.q_norm_C, k_norm_C=layer.k_norm_C,
            eps=config.rms_norm_eps,
        )
        for layer in weights.layers
    ]  # fmt: skip
    is_fp32 = pages_LP2GBC.dtype == torch.float32
    return Transformer(
        config,
        weights,
        CpuOperations(config, rotations, pages_LP2GBC),
        program=LayerProgram(config, weights, rotations, pages_LP2GBC) if is_fp32 else None,
    )


class CpuOperations:
    def __init__(self, config: ModelConfig, rotations: list[Rotation], pages_LP2GBC: torch.Tensor) -> None:
        self._config = config
        self._rotations = rotations
        self._pages_LP2GBC = pages_LP2GBC

    def norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_TD, weight_D, eps=self._config.rms_norm_eps)

    def add_norm_(
        self, residual_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor
    ) -> torch.Tensor:
        return add_rms_norm_(residual_TD, delta_TD, weight_D, eps=self._config.rms_norm_eps)

    def linear(self, x_TI: torch.Tensor, weights: Linear) -> torch.Tensor:
        if isinstance(weights.weight, Int8Weights):
            return int8_linear(x_TI, weights.weight, weights.bias)
        if isinstance(weights.weight, Panels):
            return linear(x_TI, weights.weight, weights.bias)
        return torch.nn.functional.linear(x_TI, weights.weight, weights.bias)

    def silu_mul(self, gate_up_TW: torch.Tensor) -> torch.Tensor:
        return silu_mul(gate_up_TW)

    def experts(self, x_TD: torch.Tensor, mlp: MoeMlp) -> torch.Tensor:
        weights_TK, experts_TK = route_experts(
            self.linear(x_TD, mlp.router), num_active=mlp.config.num_active, normalizes=mlp.config.normalizes
        )
        compute = expert_mlp if x_TD.dtype == torch.float32 else expert_mlp_reference
        return compute(x_TD, mlp.gate_up_EWD, mlp.down_EDI, weights_TK=weights_TK, experts_TK=experts_TK)

    def attend(self, qkv_TN: torch.Tensor, layer: int, batch: TokenBatch) -> torch.Tensor:
        config, window, scale = self._config, self._config.layers[layer].window, self._config.head_dim**-0.5
        pages_P2GBC = self._pages_LP2GBC[layer]
        rotate_and_store_(
            qkv_TN, pages_P2GBC, self._rotations[layer], positions_T=batch.positions_T, slots_T=batch.slots_T
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
