"""The operations of a transformer on a GPU. Nothing here waits for the device, so that a step can be captured whole.

Letters as in `workers.model.transformer`; E experts, K active experts per token, S = T K rows sorted by expert.
"""

import torch

from kernels.gpu.paged_kv import PagedKv
from kernels.gpu.quantized_weight import QuantizedWeight
from kernels.gpu.rotate_and_store import Rotation
from workers.model.config import ModelConfig
from workers.model.gpu_kernels import Kernels
from workers.model.kv_pages import KvPages
from workers.model.rope import cos_sin_tables
from workers.model.token_batch import TokenBatch
from workers.model.transformer import Transformer
from workers.model.weights import Linear, ModelWeights, MoeMlp, Weight


def gpu_transformer(
    config: ModelConfig, weights: ModelWeights, *, pages: KvPages, max_model_len: int, kernels: Kernels
) -> Transformer:
    """On the device of the pages, which is that of the weights."""
    device = pages.pages_LP2GBC.device
    cos_XF, sin_XF = (
        table_XF.to(device)
        for table_XF in cos_sin_tables(config.rope, head_dim=config.head_dim, num_positions=max_model_len)
    )
    rotations = [
        Rotation(
            cos_XF=cos_XF, sin_XF=sin_XF, q_norm_C=layer.q_norm_C, k_norm_C=layer.k_norm_C,
            eps=config.rms_norm_eps,
        )
        for layer in weights.layers
    ]  # fmt: skip
    return Transformer(config, weights, GpuOperations(config, rotations, pages, kernels))


class GpuOperations:
    def __init__(
        self, config: ModelConfig, rotations: list[Rotation], pages: KvPages, kernels: Kernels
    ) -> None:
        self._config = config
        self._rotations = rotations
        self._pages = pages
        self._kernels = kernels

    def norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        normed_TD: torch.Tensor = self._kernels.rms_norm(x_TD, weight_D, eps=self._config.rms_norm_eps)
        return normed_TD

    def add_norm_(
        self, residual_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor
    ) -> torch.Tensor:
        eps = self._config.rms_norm_eps
        normed_TD: torch.Tensor = self._kernels.add_rms_norm_(residual_TD, delta_TD, weight_D, eps=eps)
        return normed_TD

    def linear(self, x_TI: torch.Tensor, weights: Linear) -> torch.Tensor:
        if not isinstance(weights.weight, QuantizedWeight):
            return torch.nn.functional.linear(x_TI, weights.weight, weights.bias)
        y_TN: torch.Tensor = self._kernels.quantized_linear(x_TI, weights.weight)
        return y_TN if weights.bias is None else y_TN + weights.bias

    def silu_mul(self, gate_up_TW: torch.Tensor) -> torch.Tensor:
        act_TI: torch.Tensor = self._kernels.silu_mul(gate_up_TW)
        return act_TI

    def experts(self, x_TD: torch.Tensor, mlp: MoeMlp) -> torch.Tensor:
        num_experts, num_active = mlp.config.num_experts, mlp.config.num_active
        odds_TE = self.linear(x_TD, mlp.router).float().softmax(-1)
        weights_TK, experts_TK = odds_TE.topk(num_active, dim=-1)
        if mlp.config.normalizes:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        sorted_S, choices_S = experts_TK.flatten().sort(stable=True)
        starts = torch.searchsorted(sorted_S, torch.arange(num_experts + 1, device=x_TD.device))
        gate_up_SW = self._grouped(x_TD, mlp.gate_up_EWD, choices_S // num_active, starts)
        rows_S = torch.arange(len(sorted_S), device=x_TD.device)
        y_SD = self._grouped(self.silu_mul(gate_up_SW), mlp.down_EDI, rows_S, starts)
        places_TK = torch.empty_like(choices_S).index_copy_(0, choices_S, rows_S).view(-1, num_active)
        y_TD: torch.Tensor = self._kernels.combine_experts(y_SD, places_TK=places_TK, weights_TK=weights_TK)
        return y_TD

    def _grouped(
        self, x_TI: torch.Tensor, weight: Weight, sources_S: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        kernels = self._kernels
        is_quantized = isinstance(weight, QuantizedWeight)
        multiply = kernels.grouped_quantized_matmul if is_quantized else kernels.grouped_matmul
        y_SN: torch.Tensor = multiply(x_TI, weight, sources_S=sources_S, starts=starts)
        return y_SN

    def attend(self, qkv_TN: torch.Tensor, layer: int, batch: TokenBatch) -> torch.Tensor:
        config, pages, kernels = self._config, self._pages, self._kernels
        window, scale = config.layers[layer].window, config.head_dim**-0.5
        pages_P2GBC = pages.pages_LP2GBC[layer]
        scales_P2GB = None if pages.scales_LP2GB is None else pages.scales_LP2GB[layer]
        kernels.rotate_and_store_(
            qkv_TN, pages_P2GBC, scales_P2GB, self._rotations[layer], positions_T=batch.positions_T,
            slots_T=batch.slots_T,
        )  # fmt: skip
        q_THC = qkv_TN.view(len(qkv_TN), -1, config.head_dim)[:, : config.num_heads]
        num_singles, bounds = batch.num_singles, batch.chunk_bounds
        outs_THC = []
        if num_singles:
            kv = PagedKv(pages_P2GBC=pages_P2GBC, scales_P2GB=scales_P2GB, table_RL=batch.table_RL)
            out_THC, _ = kernels.paged_attention(
                q_THC[:num_singles], kv, rows_T=batch.rows_T[:num_singles],
                lengths_T=batch.positions_T[:num_singles] + 1, window=window, scale=scale,
            )  # fmt: skip
            outs_THC.append(out_THC)
        if bounds is not None:
            # The rows of the chunks follow those of the single tokens.
            table_NL = batch.table_RL[num_singles:]
            kv = PagedKv(pages_P2GBC=pages_P2GBC, scales_P2GB=scales_P2GB, table_RL=table_NL)
            out_THC, _ = kernels.prefill_attention(
                q_THC[num_singles:], kv, starts=bounds.starts, lengths_R=bounds.lengths_N, window=window,
                scale=scale,
            )  # fmt: skip
            outs_THC.append(out_THC)
        return (outs_THC[0] if len(outs_THC) == 1 else torch.cat(outs_THC)).flatten(1)
