"""What comes from outside is not believed: submitted requests, and what a source hands over. Pure."""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite

from workers.errors import InvalidRequest, PullCorrupted
from workers.pages import num_pages_for
from workers.request import Handoff, Purpose, Request, TokenLogprobs
from workers.step import SampledToken


def check_request(request: Request, *, vocab_size: int, max_tokens: int) -> None:
    """`InvalidRequest` if the request can never run on a worker with this vocabulary and `max_tokens` per request."""
    if not request.prompt_token_ids:
        raise InvalidRequest("the prompt has no tokens; it needs at least one")
    if request.num_tokens >= max_tokens:
        raise InvalidRequest(f"the prompt has {request.num_tokens} tokens; at most {max_tokens - 1} fit here")
    if len(request.output_token_ids) >= request.sampling.max_tokens:
        raise InvalidRequest(
            f"{len(request.output_token_ids)} tokens are generated already, max_tokens is "
            f"{request.sampling.max_tokens}"
        )
    if request.purpose is Purpose.PREFILL_ONLY and request.kv_source is not None:
        raise InvalidRequest("a PREFILL_ONLY request computes its prompt itself: it takes no kv_source")
    if not isfinite(request.arrival_s):
        raise InvalidRequest(f"arrival_s must be a time, got {request.arrival_s}")
    biased = (token_id for token_id, _ in request.sampling.logit_bias)
    for token_id in (*request.prompt_token_ids, *request.output_token_ids, *biased):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"token id {token_id} is not in the vocabulary of {vocab_size}")


def new_tokens(request: Request, handoff: Handoff, *, vocab_size: int) -> list[SampledToken]:
    """The tokens of a hand-over that are new here; `PullCorrupted` if it is not of this request."""
    num_known = len(request.output_token_ids)
    known, new = handoff.output_token_ids[:num_known], handoff.output_token_ids[num_known:]
    if list(known) != request.output_token_ids or not new:
        raise PullCorrupted(f"the hand-over has outputs {handoff.output_token_ids}, known are {known}")
    num_expected = request.num_tokens + len(new) - 1
    if handoff.num_computed_tokens != num_expected or num_pages_for(num_expected) != len(request.page_ids):
        raise PullCorrupted(
            f"the hand-over has {handoff.num_computed_tokens} computed tokens, expected are {num_expected} "
            f"in {len(request.page_ids)} pages"
        )
    if not all(0 <= token_id < vocab_size for token_id in new):
        raise PullCorrupted(f"the hand-over has tokens {new}, the vocabulary has {vocab_size}")
    if request.sampling.num_logprobs is not None and len(handoff.logprobs) < len(new):
        raise PullCorrupted(f"the hand-over has {len(handoff.logprobs)} logprobs for {len(new)} tokens")
    logprobs: Sequence[TokenLogprobs | None] = [None] * len(new)
    if request.sampling.num_logprobs is not None:
        logprobs = handoff.logprobs[-len(new) :]
    tokens = [SampledToken(token_id, each) for token_id, each in zip(new, logprobs, strict=True)]
    tokens[-1] = replace(tokens[-1], stop_string=handoff.stop_string)
    return tokens
