"""The layers of a model as one compiled program for steps of few tokens, with every buffer allocated once.

A step of a few tokens is bound by reading the weights; what Python and allocation would add between two operations is
saved by binding all of them to their buffers beforehand. Chunks of prompts need no special case: their tokens are rows
of `paged_attention` like any other, each with its own context length.

T tokens, D hidden, H query heads, C head dimension, G key/value heads, N = (H + 2G) C, I MLP width, E experts,
K active experts.
"""

from collections.abc import Callable

import torch

from kernels.expert_mlp import expert_mlp_calls
from kernels.int8_linear import Int8Weights, int8_linear_calls
from kernels.linear import linear_call
from kernels.paged_attention import paged_attention_call
from kernels.rms_norm import add_rms_norm_call
from kernels.rotary import Rotation, rotate_and_store_call
from kernels.route_experts import route_experts_call
from kernels.silu_mul import silu_mul_call
from kernels.team import Call, Program, Step
from workers.model.config import ModelConfig
from workers.model.token_batch import TokenBatch
from workers.model.weights import DenseMlp, Linear, ModelWeights, MoeMlp

MAX_TOKENS = 64


class LayerProgram:
    """Runs all layers on up to MAX_TOKENS tokens in fp32, for one pool of pages."""

    max_tokens = MAX_TOKENS

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        rotations: list[Rotation],
        pages_LP2GBC: torch.Tensor,
    ) -> None:
        self._config = config
        self._step = Step()
        rows, width = config.num_heads + 2 * config.num_kv_heads, config.head_dim
        self._residual_TD, self._x_TD = (torch.empty(MAX_TOKENS, config.hidden_size) for _ in range(2))
        self._delta_TD = torch.empty_like(self._x_TD)
        self._qkv_TN = torch.empty(MAX_TOKENS, rows * width)
        self._heads_TX = torch.empty(MAX_TOKENS, config.num_heads * width)
        self._lse_TH = torch.empty(MAX_TOKENS, config.num_heads)
        calls: list[Call] = []
        self._ends: list[int] = []  # of each layer, in calls
        for number, layer in enumerate(weights.layers):
            calls += self._norm(layer.attention_norm_D, first=number == 0)
            calls += self._linear(self._x_TD, layer.qkv, self._qkv_TN)
            pages_P2GBC = pages_LP2GBC[number]
            calls.append(rotate_and_store_call(self._step, self._qkv_TN, pages_P2GBC, rotations[number]))
            calls.append(
                paged_attention_call(
                    self._step, self._qkv_TN, pages_P2GBC, window=config.layers[number].window,
                    scale=config.head_dim**-0.5, out_TX=self._heads_TX, lse_TH=self._lse_TH,
                )
            )  # fmt: skip
            calls += self._linear(self._heads_TX, layer.output, self._delta_TD)
            calls += self._norm(layer.mlp_norm_D, first=False)
            calls += self._dense(layer.mlp) if isinstance(layer.mlp, DenseMlp) else self._moe(layer.mlp)
            self._ends.append(len(calls))
        self._program = Program(calls)

    def run(
        self, embedded_TD: torch.Tensor, batch: TokenBatch, *, on_layer: Callable[[int], None] | None
    ) -> torch.Tensor:
        """The residual stream [T, D] after all layers: a view that the next run overwrites."""
        num_tokens = len(embedded_TD)
        self._residual_TD[:num_tokens] = embedded_TD
        self._step.fill(
            num_tokens, positions_T=batch.positions_T, slots_T=batch.slots_T, rows_T=batch.rows_T,
            lengths_T=batch.positions_T + 1, table_RL=batch.table_RL,
        )  # fmt: skip
        if on_layer is None:
            self._program.run()
        else:
            start = 0
            for number, end in enumerate(self._ends):
                self._program.run(start, end)
                on_layer(number)
                start = end
        return self._residual_TD[:num_tokens] + self._delta_TD[:num_tokens]

    def _norm(self, weight_D: torch.Tensor, *, first: bool) -> list[Call]:
        delta_TD = None if first else self._delta_TD
        eps = self._config.rms_norm_eps
        return [
            add_rms_norm_call(self._step, self._residual_TD, delta_TD, weight_D, eps=eps, out_TD=self._x_TD)
        ]

    def _linear(self, x_TI: torch.Tensor, weights: Linear, out_TO: torch.Tensor) -> list[Call]:
        if isinstance(weights.weight, Int8Weights):
            return int8_linear_calls(self._step, x_TI, weights.weight, weights.bias, out_MN=out_TO)
        return [linear_call(self._step, x_TI, weights.weight, weights.bias, out_MN=out_TO)]

    def _dense(self, mlp: DenseMlp) -> list[Call]:
        width = self._config.intermediate_size
        gate_up_TW, act_TI = torch.empty(MAX_TOKENS, 2 * width), torch.empty(MAX_TOKENS, width)
        return [
            *self._linear(self._x_TD, mlp.gate_up, gate_up_TW),
            silu_mul_call(self._step, gate_up_TW, out_TI=act_TI),
            *self._linear(act_TI, mlp.down, self._delta_TD),
        ]

    def _moe(self, mlp: MoeMlp) -> list[Call]:
        num_experts, num_active = mlp.config.num_experts, mlp.config.num_active
        logits_TE, weights_TK = torch.empty(MAX_TOKENS, num_experts), torch.empty(MAX_TOKENS, num_active)
        experts_TK, places_TK = (torch.zeros(MAX_TOKENS, num_active, dtype=torch.int64) for _ in range(2))
        starts = torch.zeros(num_experts + 1, dtype=torch.int64)
        return [
            *self._linear(self._x_TD, mlp.router, logits_TE),
            route_experts_call(
                self._step, logits_TE, normalizes=mlp.config.normalizes, weights_TK=weights_TK,
                experts_TK=experts_TK, places_TK=places_TK, starts=starts,
            ),
            *expert_mlp_calls(
                self._step, self._x_TD, mlp.gate_up_EWD, mlp.down_EDI, weights_TK=weights_TK,
                places_TK=places_TK, starts=starts, out_TD=self._delta_TD,
            ),
        ]  # fmt: skip
