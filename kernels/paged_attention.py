"""Attention of one new token per row over its paged context, as a partial result.

score_j = scale q.k_j for the context tokens j (the last `window` of them, where there is a window);
lse = log(sum_j exp(score_j)), out = sum_j exp(score_j - lse) v_j. Query head h reads key/value head h * G // H.

R rows, H query heads, G key/value heads, C head dimension, P pages, B tokens per page, L longest page list.
pages_P2GBC holds keys at index 0 and values at index 1; table_RL the page ids of each row in token order.
"""

import torch


def reference(
    q_RHC: torch.Tensor,
    pages_P2GBC: torch.Tensor,
    *,
    table_RL: torch.Tensor,
    lengths_R: torch.Tensor,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [R, H, C] in the dtype of q, lse [R, H] in fp32); a row of length 0 gives 0 and -inf."""
    num_rows, num_heads, head_dim = q_RHC.shape
    _, _, num_kv_heads, block, _ = pages_P2GBC.shape
    out_RHC, lse_RH = torch.zeros_like(q_RHC), torch.full((num_rows, num_heads), -torch.inf)
    for row, length in enumerate(lengths_R.tolist()):
        if length == 0:
            continue
        pages = pages_P2GBC[table_RL[row, : -(-length // block)].long()].float()
        k_GSC, v_GSC = pages.permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)[:, :, :length]
        if window is not None:
            k_GSC, v_GSC = k_GSC[:, -window:], v_GSC[:, -window:]
        q_GMC = q_RHC[row].float().view(num_kv_heads, -1, head_dim)
        scores_GMS = scale * q_GMC @ k_GSC.transpose(1, 2)
        lse_RH[row] = scores_GMS.logsumexp(-1).flatten()
        out_RHC[row] = (scores_GMS.softmax(-1) @ v_GSC).reshape(num_heads, head_dim).to(q_RHC.dtype)
    return out_RHC, lse_RH


def paged_attention(
    q_RHC: torch.Tensor,
    pages_P2GBC: torch.Tensor,
    *,
    table_RL: torch.Tensor,
    lengths_R: torch.Tensor,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return reference(q_RHC, pages_P2GBC, table_RL=table_RL, lengths_R=lengths_R, window=window, scale=scale)
