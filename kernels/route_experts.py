"""Which experts a token goes to: the K largest of softmax(logits), in fp32, optionally rescaled to sum to one.

T tokens, E experts, K active experts per token.
"""

import torch


def reference(
    logits_TE: torch.Tensor, *, num_active: int, normalizes: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [T, K] in the dtype of the logits, experts [T, K] int64), largest first."""
    weights_TK, experts_TK = torch.topk(logits_TE.float().softmax(-1), num_active, dim=-1)
    if normalizes:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return weights_TK.to(logits_TE.dtype), experts_TK


def route_experts(
    logits_TE: torch.Tensor, *, num_active: int, normalizes: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return reference(logits_TE, num_active=num_active, normalizes=normalizes)
