"""Draws tokens where the logits are; only rows that ask for more than a draw bring theirs to this machine.

Biases, penalties, `min_tokens` and log-probabilities need a row's logits, its past and arithmetic in that order: what
the CPU's sampler does. Of all other rows nothing comes back but a token. S rows that sample, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch

from workers.engine.device_copies import Launched, to_device
from workers.engine.draws import StepDraws, draws_of
from workers.engine.engine_parts import TokenSampler
from workers.request import Request, RequestId
from workers.step import SampledToken

Draw = Callable[[torch.Tensor, StepDraws], torch.Tensor]


class DeviceSampler:
    def __init__(self, draw: Draw, *, adjusting: TokenSampler) -> None:
        self._draw = draw
        self._adjusting = adjusting

    def sample(self, requests: Sequence[Request], logits_SV: torch.Tensor) -> list[SampledToken]:
        adjusted = [row for row, request in enumerate(requests) if needs_logits(request)]
        if not adjusted:
            return self._drawn(requests, logits_SV)
        drawn = [row for row in range(len(requests)) if row not in set(adjusted)]
        logits_of_adjusted = logits_SV[to_device(torch.tensor(adjusted), logits_SV.device)]
        tokens: dict[int, SampledToken] = {}
        if drawn:
            logits_of_drawn = logits_SV[to_device(torch.tensor(drawn), logits_SV.device)]
            sampled = self._drawn([requests[row] for row in drawn], logits_of_drawn)
            tokens.update(zip(drawn, sampled, strict=True))
        sampled = self._adjusting.sample([requests[row] for row in adjusted], logits_of_adjusted.cpu())
        tokens.update(zip(adjusted, sampled, strict=True))
        return [tokens[row] for row in range(len(requests))]

    def forget(self, request_id: RequestId) -> None:
        self._adjusting.forget(request_id)

    def _drawn(self, requests: Sequence[Request], logits_SV: torch.Tensor) -> list[SampledToken]:
        if all(request.sampling.temperature == 0 for request in requests):
            return [SampledToken(token_id) for token_id in Launched(logits_SV.argmax(-1)).token_ids()]
        draws = draws_of([(request.sampling, len(request.output_token_ids)) for request in requests])
        on_device = {
            field.name: to_device(getattr(draws, field.name), logits_SV.device) for field in fields(draws)
        }
        tokens = Launched(self._draw(logits_SV, StepDraws(**on_device)))
        return [SampledToken(token_id) for token_id in tokens.token_ids()]


def needs_logits(request: Request) -> bool:
    """Whether a row asks for more than a draw."""
    sampling = request.sampling
    penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    return (
        bool(sampling.logit_bias)
        or len(request.output_token_ids) < sampling.min_tokens
        or penalties != (1.0, 0.0, 0.0)
        or sampling.num_logprobs is not None
    )
