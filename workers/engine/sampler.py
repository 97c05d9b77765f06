"""Chooses the next token of every row: biases, penalties, the draw, log-probabilities.

For each row, in this order: logit_bias is added; tokens that would end the text too early (min_tokens) become
impossible; repetition, frequency and presence penalties (kernels/penalize.py); then the draw
(kernels/sample.py). A row for which none of this is asked costs an argmax.

Log-probabilities are those of the model itself: log_softmax of the raw logits, before biases, penalties and
temperature.

Nothing here must survive a worker: what is kept of a request is a cache over its tokens, and a draw depends
on the seed and on the token's number alone. Letters: R rows, V vocabulary, K most likely tokens.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from kernels.penalize import penalize_
from kernels.sample import Draws, sample, uniform
from workers.request import Request, RequestId, SamplingParams, TokenLogprobs
from workers.step import SampledToken


class Sampler:
    """Called from one thread at a time. Its only state is a cache of token counts per request."""

    def __init__(self, *, eos_token_ids: Iterable[int], vocab_size: int) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._vocab_size = vocab_size
        self._counts: dict[RequestId, _TokenCounts] = {}

    def sample(self, requests: Sequence[Request], logits_RV: torch.Tensor) -> list[SampledToken]:
        """A token for every request; row i of `logits_RV` predicts the token after the last of `requests[i]`."""
        if logits_RV.shape != (len(requests), self._vocab_size):
            raise ValueError(
                f"logits must be [{len(requests)}, {self._vocab_size}], got {list(logits_RV.shape)}"
            )
        logits_RV = logits_RV.float()
        token_R = sample(self._adjust(requests, logits_RV), _draws(requests))
        return _with_logprobs(requests, logits_RV, token_R)

    def forget(self, request_id: RequestId) -> None:
        """Drops what is cached of a request; without effect if nothing is."""
        self._counts.pop(request_id, None)

    def _adjust(self, requests: Sequence[Request], logits_RV: torch.Tensor) -> torch.Tensor:
        """Logits with biases, impossible tokens and penalties: a copy if there are any."""
        biased = [row for row, request in enumerate(requests) if request.sampling.logit_bias]
        ending = [
            row
            for row, request in enumerate(requests)
            if len(request.output_token_ids) < request.sampling.min_tokens
        ]
        penalized = [
            row for row, request in enumerate(requests) if _penalties(request.sampling) != (1.0, 0.0, 0.0)
        ]
        if not (biased or ending or penalized):
            return logits_RV
        logits_RV = logits_RV.clone()
        for row in biased:
            token_ids, biases = zip(*requests[row].sampling.logit_bias, strict=True)
            logits_RV[row, list(token_ids)] += torch.tensor(biases)
        for row in ending:
            logits_RV[row, self._ending_token_ids(requests[row].sampling)] = -torch.inf
        if penalized:
            self._penalize(requests, penalized, logits_RV)
        return logits_RV

    def _ending_token_ids(self, sampling: SamplingParams) -> list[int]:
        eos_token_ids = () if sampling.ignore_eos else self._eos_token_ids
        return [i for i in (*eos_token_ids, *sampling.stop_token_ids) if i < self._vocab_size]

    def _penalize(self, requests: Sequence[Request], rows: list[int], logits_RV: torch.Tensor) -> None:
        counts = [self._counts_of(requests[row]) for row in rows]
        num_tokens = [len(count.token_ids) for count in counts]
        penalize_(
            logits_RV,
            torch.from_numpy(np.repeat(rows, num_tokens)),
            torch.from_numpy(np.concatenate([count.token_ids for count in counts])),
            count_N=torch.from_numpy(np.concatenate([count.num_outputs for count in counts])),
            penalties_R3=torch.tensor([_penalties(request.sampling) for request in requests]),
        )

    def _counts_of(self, request: Request) -> "_TokenCounts":
        counts = self._counts.get(request.request_id)
        if counts is None or counts.request is not request:
            counts = self._counts[request.request_id] = _TokenCounts(request)
        counts.follow()
        return counts


class _TokenCounts:
    """The distinct tokens of a request's prompt and output, and how often the output has each."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._num_followed = 0
        distinct = dict.fromkeys(request.prompt_token_ids)
        self._slot = {token_id: slot for slot, token_id in enumerate(distinct)}
        self._token_ids = np.fromiter(distinct, dtype=np.int64)
        self._num_outputs = np.zeros(len(distinct), dtype=np.float32)

    @property
    def token_ids(self) -> np.ndarray:
        return self._token_ids[: len(self._slot)]

    @property
    def num_outputs(self) -> np.ndarray:
        return self._num_outputs[: len(self._slot)]

    def follow(self) -> None:
        """Counts the output tokens that are new since the last call."""
        for token_id in self.request.output_token_ids[self._num_followed :]:
            slot = self._slot.setdefault(token_id, len(self._slot))
            if slot == len(self._token_ids):
                self._token_ids = np.concatenate([self._token_ids, np.zeros(slot + 16, dtype=np.int64)])
                self._num_outputs = np.concatenate([self._num_outputs, np.zeros(slot + 16, dtype=np.float32)])
            self._token_ids[slot] = token_id
            self._num_outputs[slot] += 1
        self._num_followed = len(self.request.output_token_ids)


def _penalties(sampling: SamplingParams) -> tuple[float, float, float]:
    return sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty


def _draws(requests: Sequence[Request]) -> Draws:
    samplings = [request.sampling for request in requests]
    return Draws(
        temperature=np.array([sampling.temperature for sampling in samplings], dtype=np.float64),
        top_k=np.array([sampling.top_k for sampling in samplings], dtype=np.int64),
        top_p=np.array([sampling.top_p for sampling in samplings], dtype=np.float64),
        min_p=np.array([sampling.min_p for sampling in samplings], dtype=np.float64),
        uniform=uniform(
            np.array([sampling.seed for sampling in samplings], dtype=np.uint64),
            np.array([len(request.output_token_ids) for request in requests], dtype=np.uint64),
        ),
    )


def _with_logprobs(
    requests: Sequence[Request], logits_RV: torch.Tensor, token_R: torch.Tensor
) -> list[SampledToken]:
    token_ids = token_R.tolist()
    asked = {
        row: request.sampling.num_logprobs
        for row, request in enumerate(requests)
        if request.sampling.num_logprobs is not None
    }
    if not asked:
        return [SampledToken(token_id) for token_id in token_ids]
    rows = torch.tensor(list(asked))
    asked_RV = logits_RV[rows]
    log_total_R1 = asked_RV.logsumexp(dim=1, keepdim=True)
    chosen = (asked_RV.gather(1, token_R[rows, None]) - log_total_R1)[:, 0].tolist()
    top_RK, top_token_RK = asked_RV.topk(min(max(asked.values()), asked_RV.shape[1]), dim=1)
    top, top_token_ids = (top_RK - log_total_R1).tolist(), top_token_RK.tolist()
    logprobs = {
        row: TokenLogprobs(chosen[i], tuple(zip(top_token_ids[i][:num], top[i][:num], strict=True)))
        for i, (row, num) in enumerate(asked.items())
    }
    return [SampledToken(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)]
