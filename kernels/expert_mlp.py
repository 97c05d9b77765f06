"""The experts of a mixture: y_t = sum_k weight_tk down_e(silu(gate_e x_t) * up_e x_t), e = expert_tk.

T tokens, K active experts per token, E experts, D channels, I expert width, W = 2I. gate_up_EWD holds all I gate rows
of an expert, then its up rows; down_EDI its [D, I] output matrix.
"""

import torch

from kernels import silu_mul


def reference(
    x_TD: torch.Tensor,
    gate_up_EWD: torch.Tensor,
    down_EDI: torch.Tensor,
    *,
    weights_TK: torch.Tensor,
    experts_TK: torch.Tensor,
) -> torch.Tensor:
    y_TD = torch.zeros_like(x_TD)
    for expert in experts_TK.unique().tolist():
        token_S, choice_S = (experts_TK == expert).nonzero(as_tuple=True)
        act_SI = silu_mul.reference(x_TD[token_S] @ gate_up_EWD[expert].T)
        y_TD.index_add_(0, token_S, act_SI @ down_EDI[expert].T * weights_TK[token_S, choice_S, None])
    return y_TD


def expert_mlp(
    x_TD: torch.Tensor,
    gate_up_EWD: torch.Tensor,
    down_EDI: torch.Tensor,
    *,
    weights_TK: torch.Tensor,
    experts_TK: torch.Tensor,
) -> torch.Tensor:
    return reference(x_TD, gate_up_EWD, down_EDI, weights_TK=weights_TK, experts_TK=experts_TK)
