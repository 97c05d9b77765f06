"""Sampling options of a request body, with OpenAI's defaults, and the seeds of its choices."""

import secrets

from control_plane.errors import InvalidRequest
from control_plane.gateway.schema import UINT64_MAX, ChatCompletionRequest, CompletionRequest
from control_plane.generation import SamplingOptions


def sampling_of(
    body: ChatCompletionRequest | CompletionRequest, *, choice: int, max_tokens: int, num_logprobs: int | None
) -> SamplingOptions:
    """Options of the `choice`-th choice of a prompt, which may generate up to `max_tokens`."""
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"'min_tokens' is {min_tokens} and exceeds the {max_tokens} tokens that may be generated.",
            param="min_tokens",
        )
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return SamplingOptions(
        temperature=_or(body.temperature, 1.0),
        top_k=max(body.top_k or 0, 0),
        top_p=_or(body.top_p, 1.0),
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=logit_bias_of(body),
        seed=secrets.randbits(64) if body.seed is None else choice_seed(body.seed, choice),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        stop_strings=tuple(stop),
        num_logprobs=num_logprobs,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
    )


def logit_bias_of(body: ChatCompletionRequest | CompletionRequest) -> tuple[tuple[int, float], ...]:
    return tuple((int(token_id), bias) for token_id, bias in (body.logit_bias or {}).items())


def choice_seed(seed: int, choice: int) -> int:
    """The seed of a request's n-th choice; choice 0 has the request's own.

    The others pass through the SplitMix64 finalizer (Steele et al., 2014).
    """
    state = seed & UINT64_MAX
    if choice == 0:
        return state
    state = (state + choice * 0x9E3779B97F4A7C15) & UINT64_MAX
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & UINT64_MAX
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & UINT64_MAX
    return state ^ (state >> 31)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
