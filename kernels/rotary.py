"""Queries and keys get their norm and their rotation; keys and values go to their pages. One pass over a step's tokens.

For each head x of C channels with halves (a, b), position p and frequencies f: x = norm(x) where the model has such
norms, then (a, b) -> (a cos(pf) - b sin(pf), b cos(pf) + a sin(pf)) (Su et al., 2021, in Hugging Face's half split).

T tokens, H query heads, G key/value heads, N = (H + 2G) C, P pages, B tokens per page, X positions, F = C/2.
A slot is page * B + place in the page; pages_P2GBC holds keys at index 0 and values at index 1.
"""

import torch

from kernels import rms_norm


def reference(
    x_THC: torch.Tensor, positions_T: torch.Tensor, cos_XF: torch.Tensor, sin_XF: torch.Tensor
) -> torch.Tensor:
    """The rotated heads, computed in fp32, in the dtype of `x_THC`."""
    a, b = x_THC.float().chunk(2, dim=-1)
    cos_T1F, sin_T1F = cos_XF[positions_T].unsqueeze(1), sin_XF[positions_T].unsqueeze(1)
    return torch.cat((a * cos_T1F - b * sin_T1F, b * cos_T1F + a * sin_T1F), dim=-1).to(x_THC.dtype)


def rotate_and_store_(
    qkv_TN: torch.Tensor,
    pages_P2GBC: torch.Tensor,
    *,
    positions_T: torch.Tensor,
    slots_T: torch.Tensor,
    cos_XF: torch.Tensor,
    sin_XF: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> None:
    """Overwrites queries and keys in `qkv_TN` by their rotated form and writes keys and values to their slots."""
    _, _, num_kv_heads, block, head_dim = pages_P2GBC.shape
    heads_TMC = qkv_TN.view(qkv_TN.shape[0], -1, head_dim)
    q_THC, k_TGC = heads_TMC[:, : -2 * num_kv_heads], heads_TMC[:, -2 * num_kv_heads : -num_kv_heads]
    for x, norm_C in ((q_THC, norms and norms[0]), (k_TGC, norms and norms[1])):
        normed = x if norm_C is None else rms_norm.reference(x, norm_C, eps=eps)
        x.copy_(reference(normed, positions_T, cos_XF, sin_XF))
    page_T, place_T = slots_T // block, slots_T % block
    pages_P2GBC[page_T, 0, :, place_T] = k_TGC
    pages_P2GBC[page_T, 1, :, place_T] = heads_TMC[:, -num_kv_heads:]
