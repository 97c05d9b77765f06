"""Causal attention of a chunk of one request over its paged prefix and itself, as a partial result.

Token i of the chunk stands at position `num_prefix` + i and reads the positions up to its own (the last `window` of
them, where there is a window): score_ij = scale q_i.k_j, lse_i = log(sum_j exp(score_ij)),
out_i = sum_j exp(score_ij - lse_i) v_j.
Without a window, prefix and chunk are two partial results, merged exactly. For bfloat16; in fp32 prompts run as
`paged_attention`, whose results do not depend on how a prompt is cut into chunks.

T tokens of the chunk, S of the prefix, H query heads, G key/value heads, M = H/G, C head dimension, P pages,
B tokens per page.
"""

import torch

from kernels import merge_partials


def reference(
    q_THC: torch.Tensor, k_UGC: torch.Tensor, v_UGC: torch.Tensor, *, window: int | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over the U = S + T tokens of prefix and chunk together: (out [T, H, C] in q's dtype, lse [T, H] in fp32)."""
    num_tokens, num_heads, _ = q_THC.shape
    num_all, num_kv_heads, _ = k_UGC.shape
    k_UHC, v_UHC = (x.float().repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (k_UGC, v_UGC))
    scores_THU = scale * torch.einsum("thc,uhc->thu", q_THC.float(), k_UHC)
    scores_THU += _mask(num_tokens, num_all, window).unsqueeze(1)
    out_THC = torch.einsum("thu,uhc->thc", scores_THU.softmax(-1), v_UHC)
    return out_THC.to(q_THC.dtype), scores_THU.logsumexp(-1)


def prefill_attention(
    q_THC: torch.Tensor,
    k_TGC: torch.Tensor,
    v_TGC: torch.Tensor,
    pages_P2GBC: torch.Tensor,
    *,
    prefix_pages: torch.Tensor,
    num_prefix: int,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, C], lse [T, H] in fp32) of a chunk after the first `num_prefix` tokens in `prefix_pages` (ids)."""
    if num_prefix == 0 and (window is None or len(q_THC) <= window):
        return _flash(q_THC, k_TGC, v_TGC, causal=True, mask=None, scale=scale)
    k_SGC, v_SGC = _gather(pages_P2GBC, prefix_pages, num_prefix)
    if window is None or num_prefix + len(q_THC) <= window:
        partials = (
            _flash(q_THC, k_SGC, v_SGC, causal=False, mask=None, scale=scale),
            _flash(q_THC, k_TGC, v_TGC, causal=True, mask=None, scale=scale),
        )
        return merge_partials.merge_partials(
            torch.stack([out for out, _ in partials]), torch.stack([lse for _, lse in partials])
        )
    # With a window some tokens may see nothing of the prefix: one softmax over both, in which each sees itself.
    first = max(0, num_prefix - window + 1)
    k_UGC, v_UGC = torch.cat((k_SGC[first:], k_TGC)), torch.cat((v_SGC[first:], v_TGC))
    mask_TU = _mask(len(q_THC), len(k_UGC), window).to(q_THC.dtype)
    return _flash(q_THC, k_UGC, v_UGC, causal=False, mask=mask_TU, scale=scale)


def _mask(num_tokens: int, num_all: int, window: int | None) -> torch.Tensor:
    """0 where token i of the last `num_tokens` of `num_all` sees token j, else -inf; [T, U]."""
    distance_TU = torch.arange(num_all - num_tokens, num_all).unsqueeze(1) - torch.arange(num_all)
    hidden_TU = distance_TU < 0
    if window is not None:
        hidden_TU |= distance_TU >= window
    return torch.zeros(num_tokens, num_all).masked_fill_(hidden_TU, -torch.inf)


def _gather(
    pages_P2GBC: torch.Tensor, page_ids: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and the values of `num_tokens` tokens, each a [S, G, C] view of one gathered copy."""
    _, _, num_kv_heads, block, head_dim = pages_P2GBC.shape
    page_ids = page_ids[: -(-num_tokens // block)]
    kv_2GSC = pages_P2GBC[page_ids].permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)
    k_SGC, v_SGC = kv_2GSC[:, :, :num_tokens].transpose(1, 2)
    return k_SGC, v_SGC


def _flash(
    q_THC: torch.Tensor,
    k_UGC: torch.Tensor,
    v_UGC: torch.Tensor,
    *,
    causal: bool,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's tiled attention. A key/value head is a batch entry whose M query heads read it through a stride of 0."""
    num_tokens, num_heads, head_dim = q_THC.shape
    num_kv_heads = k_UGC.shape[1]
    q_GMTC = q_THC.reshape(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    k_GMUC, v_GMUC = (
        x.transpose(0, 1).unsqueeze(1).expand(-1, num_heads // num_kv_heads, -1, -1) for x in (k_UGC, v_UGC)
    )
    out_GMTC, lse_GMT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_GMTC, k_GMUC, v_GMUC, 0.0, causal, attn_mask=mask, scale=scale
    )
    out_THC = out_GMTC.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)
    return out_THC, lse_GMT.permute(2, 0, 1).reshape(num_tokens, num_heads)
