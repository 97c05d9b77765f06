"""Penalties on the logits of tokens that were seen before.

For a token of the prompt or the output, c times in the output (c may be 0), z its logit:

    z = z / r if z > 0 else z * r      repetition penalty r
    z = z - c * f                      frequency penalty f
    z = z - p   if c > 0               presence penalty p

The repetition penalty is that of Keskar et al. ("CTRL", 2019), the other two are OpenAI's. Entries are
sparse: N (row, token) pairs, each pair at most once per call. Letters: R rows, V vocabulary, N entries.
"""

import torch


def reference(
    logits_RV: torch.Tensor,
    row_N: torch.Tensor,
    token_N: torch.Tensor,
    *,
    count_N: torch.Tensor,
    penalties_R3: torch.Tensor,
) -> torch.Tensor:
    """Penalised logits, one entry at a time; `penalties_R3` has (repetition, frequency, presence) per row."""
    logits_RV = logits_RV.clone()
    for row, token, count in zip(row_N.tolist(), token_N.tolist(), count_N.tolist(), strict=True):
        repetition, frequency, presence = penalties_R3[row]
        z = logits_RV[row, token]
        z = z / repetition if z > 0 else z * repetition
        logits_RV[row, token] = z - count * frequency - (count > 0) * presence
    return logits_RV


def penalize_(
    logits_RV: torch.Tensor,
    row_N: torch.Tensor,
    token_N: torch.Tensor,
    *,
    count_N: torch.Tensor,
    penalties_R3: torch.Tensor,
) -> None:
    """In place. `count_N` (float32): occurrences in the output; 0 for a token that only the prompt has."""
    if not len(row_N) == len(token_N) == len(count_N):
        raise ValueError(
            f"{len(row_N)} rows, {len(token_N)} tokens, {len(count_N)} counts; need as many of each"
        )
    repetition_N, frequency_N, presence_N = penalties_R3[row_N].unbind(dim=1)
    z_N = logits_RV[row_N, token_N]
    z_N = torch.where(z_N > 0, z_N / repetition_N, z_N * repetition_N)
    logits_RV[row_N, token_N] = z_N - count_N * frequency_N - (count_N > 0) * presence_N
