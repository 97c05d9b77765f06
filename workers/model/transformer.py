"""One decoder-only transformer for every family: the config says what a layer has, the operations compute it.

T tokens of the step (all rows end to end), V vocabulary, D hidden, H query heads, G key/value heads, C head dimension,
N = (H + 2G) C, W = 2I twice the MLP width, P pages, B tokens per page, L layers, S rows that sample.
"""

from collections.abc import Callable

import torch

from workers.model.config import ModelConfig
from workers.model.operations import Operations, Program
from workers.model.token_batch import TokenBatch
from workers.model.weights import DenseMlp, ModelWeights, MoeMlp


class Transformer:
    """The weights of a model and what computes them; not to be used by two threads at once.

    Steps of few tokens run as a compiled program where there is one, others operation by operation.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        operations: Operations,
        *,
        program: Program | None = None,
    ) -> None:
        self.config = config
        self._weights = weights
        self._operations = operations
        self._program = program

    @torch.inference_mode()
    def forward(self, batch: TokenBatch, *, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Logits [S, V] in fp32. Writes keys and values to their slots; `on_layer(l)` follows those of layer l."""
        embedded_TD: torch.Tensor = self._weights.embedding_VD[batch.token_ids_T]
        if self._program is not None and len(embedded_TD) <= self._program.max_tokens:
            hidden_SD = self._program.run(embedded_TD, batch, on_layer=on_layer)[batch.sampled_S]
        else:
            hidden_SD = self._layers(embedded_TD, batch, on_layer)
        last_SD = self._operations.norm(hidden_SD, self._weights.final_norm_D)
        return self._operations.linear(last_SD, self._weights.lm_head).float()

    def _layers(
        self, residual_TD: torch.Tensor, batch: TokenBatch, on_layer: Callable[[int], None] | None
    ) -> torch.Tensor:
        """The residual stream [S, D] after all layers, operation by operation."""
        operations = self._operations
        delta_TD: torch.Tensor | None = None
        for number, layer in enumerate(self._weights.layers):
            x_TD = self._next_norm(residual_TD, delta_TD, layer.attention_norm_D)
            heads_TX = operations.attend(operations.linear(x_TD, layer.qkv), number, batch)
            if on_layer is not None:
                on_layer(number)
            if number == len(self._weights.layers) - 1:
                # All keys and values are written: from here on only the tokens that sample matter.
                heads_TX, residual_TD = heads_TX[batch.sampled_S], residual_TD[batch.sampled_S]
            delta_TD = operations.linear(heads_TX, layer.output)
            x_TD = self._next_norm(residual_TD, delta_TD, layer.mlp_norm_D)
            delta_TD = self._mlp(x_TD, layer.mlp)
        assert delta_TD is not None
        return residual_TD + delta_TD

    def _next_norm(
        self, residual_TD: torch.Tensor, delta_TD: torch.Tensor | None, weight_D: torch.Tensor
    ) -> torch.Tensor:
        """Adds what the last block computed to the residual stream, in place, and returns the norm of the sum."""
        if delta_TD is None:
            return self._operations.norm(residual_TD, weight_D)
        return self._operations.add_norm_(residual_TD, delta_TD, weight_D)

    def _mlp(self, x_TD: torch.Tensor, mlp: DenseMlp | MoeMlp) -> torch.Tensor:
        operations = self._operations
        if isinstance(mlp, DenseMlp):
            return operations.linear(operations.silu_mul(operations.linear(x_TD, mlp.gate_up)), mlp.down)
        return operations.experts(x_TD, mlp)
