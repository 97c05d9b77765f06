"""The Qwen3-MoE network as plain torch, quick to train on a CPU.

Shapes: N rows, T tokens in a row, M = N*T, D hidden size, C head size, H query heads, G key/value heads, E experts, K
experts per token, I width of an expert, V vocabulary, S tokens that are learnt. Everything is float32: on
the AVX512-BF16 cores of the first training run, bfloat16 products were 5 % quicker in all.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CONSTANT = 0.35  # the first channel of every embedding at the start; the others have a deviation of 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of the demo model, under the names of Hugging Face's configuration."""

    vocab_size: int = 2560
    hidden_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    def hugging_face(self) -> dict[str, Any]:
        """The content of config.json."""
        fixed = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 4,
            "pad_token_id": 0,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "intermediate_size": self.moe_intermediate_size * self.num_experts_per_tok,
            "norm_topk_prob": True,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.01,
            "rope_scaling": None,
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }
        return dict(json.loads(json.dumps(fixed | asdict(self))))


class Norm(nn.Module):
    """Root mean square norm with a weight per channel."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def _matrix(*size: int, scale: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(*size) * scale)


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys and rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, h, g, c = shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.sizes = (h, g, c)
        self.q_proj = _matrix(h * c, d, scale=d**-0.5)
        self.k_proj = _matrix(g * c, d, scale=d**-0.5)
        self.v_proj = _matrix(g * c, d, scale=d**-0.5)
        self.o_proj = _matrix(d, h * c, scale=0.2 * (h * c) ** -0.5)
        self.q_norm = Norm(c, shape.rms_norm_eps)
        self.k_norm = Norm(c, shape.rms_norm_eps)

    def heads(
        self, x_NTD: torch.Tensor, cos_TC: torch.Tensor, sin_TC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [N, H, T, head size] of normed input; a group's keys are repeated for its heads."""
        n, t, _ = x_NTD.shape
        h, g, c = self.sizes
        w = torch.cat([self.q_proj, self.k_proj, self.v_proj])
        q, k, v = torch.split(F.linear(x_NTD, w), [h * c, g * c, g * c], dim=-1)
        q = _rotate(self.q_norm(q.view(n, t, h, c)).transpose(1, 2), cos_TC, sin_TC)
        k = _rotate(self.k_norm(k.view(n, t, g, c)).transpose(1, 2), cos_TC, sin_TC)
        v = v.view(n, t, g, c).transpose(1, 2)
        return q, k.repeat_interleave(h // g, dim=1), v.repeat_interleave(h // g, dim=1)

    def forward(self, x_NTD: torch.Tensor, cos_TC: torch.Tensor, sin_TC: torch.Tensor) -> torch.Tensor:
        y_NHTC = F.scaled_dot_product_attention(*self.heads(x_NTD, cos_TC, sin_TC), is_causal=True)
        return F.linear(y_NHTC.transpose(1, 2).flatten(2), self.o_proj)


def _rotate(x: torch.Tensor, cos_TC: torch.Tensor, sin_TC: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos_TC + torch.cat([-right, left], dim=-1) * sin_TC


class Experts(nn.Module):
    """A mixture of gated experts: tokens sorted by expert, one product per expert."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, i, e = shape.hidden_size, shape.moe_intermediate_size, shape.num_experts
        self.top_k = shape.num_experts_per_tok
        self.router = _matrix(e, d, scale=0.02)
        self.gate_up = _matrix(e, 2 * i, d, scale=d**-0.5)
        self.down = _matrix(e, d, i, scale=0.2 * i**-0.5)

    def forward(self, x_MD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_experts = self.router.shape[0]
        odds_ME = torch.softmax(F.linear(x_MD, self.router), dim=-1)
        top_MK, expert_MK = odds_ME.topk(self.top_k, dim=-1)
        top_MK = top_MK / top_MK.sum(-1, keepdim=True)
        order = expert_MK.reshape(-1).argsort(stable=True)
        counts = torch.bincount(expert_MK.reshape(-1), minlength=num_experts)
        source = order // self.top_k
        gate_up, down = self.gate_up.unbind(), self.down.unbind()
        sorted_parts = torch.split(x_MD[source], counts.tolist())
        parts = []
        for expert, part in enumerate(sorted_parts):
            gate, up = F.linear(part, gate_up[expert]).chunk(2, dim=-1)
            parts.append(F.linear(F.silu(gate) * up, down[expert]))
        scaled = torch.cat(parts) * top_MK.reshape(-1)[order, None]
        # Each token stands at K places of the sorted list; gathering them back is quicker than index_add.
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        y_MD = scaled[back].view(len(x_MD), self.top_k, -1).sum(1)
        balance = num_experts * (counts / counts.sum() * odds_ME.mean(0)).sum()
        return y_MD, balance


class Layer(nn.Module):
    """Attention and experts, each behind its norm and added to the stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.attention = Attention(shape)
        self.post_norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.experts = Experts(shape)

    def forward(
        self, x_NTD: torch.Tensor, cos_TC: torch.Tensor, sin_TC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_NTD = x_NTD + self.attention(self.input_norm(x_NTD), cos_TC, sin_TC)
        y_MD, balance = self.experts(self.post_norm(x_NTD).flatten(0, 1))
        return x_NTD + y_MD.view_as(x_NTD), balance


class Network(nn.Module):
    """Tokens in, logits out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = _matrix(shape.vocab_size, shape.hidden_size, scale=0.05)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self._start_with_a_sense_of_order()

    def _start_with_a_sense_of_order(self) -> None:
        """Makes some heads of the first layer look one or two tokens back.

        Recall needs "what came after this word before", which stands on "which word was before me". Without
        biases, heads are slow to find that: copying began after 0.5 million tokens with this start and had not
        begun after 0.9 million without. The heads need a channel that is the same for every token; the tied output
        layer cannot see it, as it moves all logits alike.
        """
        shape, attention = self.shape, self.blocks()[0].attention
        c = shape.head_dim
        ratio = shape.num_attention_heads // shape.num_key_value_heads
        rates = shape.rope_theta ** (-torch.arange(4) * 2 / c)  # the quick rotations tell neighbours apart
        with torch.no_grad():
            self.embedding[:, 0] = CONSTANT
            attention.q_norm.weight.fill_(2.0)
            for group, distance in enumerate((1, 2)):
                attention.k_proj[group * c : group * c + 4, 0] += (rates * distance).cos()
                attention.k_proj[group * c + c // 2 : group * c + c // 2 + 4, 0] += (rates * distance).sin()
                for head in range(group * ratio, (group + 1) * ratio):
                    attention.q_proj[head * c : head * c + 4, 0] += 1.0

    def hidden(self, tokens_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed last hidden states [N, T, D] and the balance loss, 1.0 when all experts get the same work."""
        x_NTD = F.embedding(tokens_NT, self.embedding)
        cos_TC, sin_TC = self.rotary(tokens_NT.shape[1], tokens_NT.device)
        balance = torch.zeros((), device=tokens_NT.device)
        for layer in self.layers:
            x_NTD, one = layer(x_NTD, cos_TC, sin_TC)
            balance = balance + one / len(self.layers)
        return self.norm(x_NTD), balance

    def blocks(self) -> list[Layer]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.embedding)

    def forward(self, tokens_NT: torch.Tensor) -> torch.Tensor:
        return self.logits(self.hidden(tokens_NT)[0])

    def rotary(self, num_tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, head size] of the positions' angles."""
        c = self.shape.head_dim
        rates = self.shape.rope_theta ** (-torch.arange(0, c, 2, device=device).float() / c)
        angles = torch.outer(torch.arange(num_tokens, device=device).float(), rates)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()
