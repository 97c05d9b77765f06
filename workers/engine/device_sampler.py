"""Draws tokens where the logits are; only rows that ask for more than a draw bring theirs to this machine.

Biases, penalties, `min_tokens` and log-probabilities need a row's logits, its past and arithmetic in that order: what
the CPU's sampler does. Of all other rows nothing comes back but a token. S rows that sample, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch

from workers.engine.device_copies import Launched, to_device
from workers.engine.draws import StepDraws, draws_of
from workers.engine.engine_parts import Drawn, TokenSampler
from workers.engine.latest_tokens import LatestTokens
from workers.request import RequestId, SamplingParams
from workers.step import SampledToken, ScheduledRequest

Draw = Callable[[torch.Tensor, StepDraws], torch.Tensor]


class DeviceSampler:
    def __init__(self, draw: Draw, latest: LatestTokens, *, adjusting: TokenSampler) -> None:
        self._draw = draw
        self._latest = latest
        self._adjusting = adjusting

    def draw(self, rows: Sequence[ScheduledRequest], logits_SV: torch.Tensor) -> Drawn:
        """Waits for the device only where a row asks for more than a draw."""
        adjusted = [place for place, row in enumerate(rows) if _needs_logits(row)]
        if not adjusted:
            return self._launch(rows, logits_SV)
        plain = [place for place in range(len(rows)) if place not in set(adjusted)]
        drawn = self._launch([rows[place] for place in plain], _rows(logits_SV, plain)) if plain else list
        requests = [rows[place].request for place in adjusted]
        tokens = dict(
            zip(adjusted, self._adjusting.sample(requests, _rows(logits_SV, adjusted).cpu()), strict=True)
        )

        def all_tokens() -> list[SampledToken]:
            tokens.update(zip(plain, drawn(), strict=True))
            return [tokens[place] for place in range(len(rows))]

        return all_tokens

    def can_draw_ahead(self, rows: Sequence[ScheduledRequest]) -> bool:
        drawn = [row for row in rows if row.samples]
        return not any(_needs_logits(row) or row.request.sampling.stop_strings for row in drawn)

    def forget(self, request_id: RequestId) -> None:
        self._adjusting.forget(request_id)

    def _launch(self, rows: Sequence[ScheduledRequest], logits_SV: torch.Tensor) -> Drawn:
        token_S = self._drawn(rows, logits_SV)
        self._latest.put([row.request.request_id for row in rows], token_S)
        launched = Launched(token_S)
        return lambda: [SampledToken(token_id) for token_id in launched.token_ids()]

    def _drawn(self, rows: Sequence[ScheduledRequest], logits_SV: torch.Tensor) -> torch.Tensor:
        if all(row.request.sampling.temperature == 0 for row in rows):
            return logits_SV.argmax(-1)
        draws = draws_of([(row.request.sampling, row.num_sampled_before) for row in rows])
        on_device = {
            field.name: to_device(getattr(draws, field.name), logits_SV.device) for field in fields(draws)
        }
        return self._draw(logits_SV, StepDraws(**on_device))


def needs_logits(sampling: SamplingParams, *, num_sampled: int) -> bool:
    """Whether the token after so many asks for more than a draw."""
    penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    return (
        bool(sampling.logit_bias)
        or num_sampled < sampling.min_tokens
        or penalties != (1.0, 0.0, 0.0)
        or sampling.num_logprobs is not None
    )


def _needs_logits(row: ScheduledRequest) -> bool:
    return needs_logits(row.request.sampling, num_sampled=row.num_sampled_before)


def _rows(logits_SV: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    return logits_SV[to_device(torch.tensor(places), logits_SV.device)]
