"""What comes from outside is not believed: submitted requests, and what a source hands over. Pure."""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite

from workers.errors import InvalidRequest, PullCorrupted
from workers.outputs import ends_text
from workers.pages import num_pages_for
from workers.request import FinishReason, Handoff, Purpose, Request, TokenLogprobs
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


def handed_over_tokens(request: Request, handoff: Handoff, *, vocab_size: int) -> list[SampledToken]:
    """The tokens of a hand-over, or of a move, that are new here; perhaps none.

    Raises PullCorrupted if it is not of this request, or says what no source can know of it.
    """
    num_known = len(request.output_token_ids)
    known, new = handoff.output_token_ids[:num_known], handoff.output_token_ids[num_known:]
    if list(known) != request.output_token_ids:
        raise PullCorrupted(f"the hand-over has outputs {handoff.output_token_ids}, known are {known}")
    if not all(0 <= token_id < vocab_size for token_id in new):
        raise PullCorrupted(f"the hand-over has tokens {new}, the vocabulary has {vocab_size}")
    if handoff.num_cached_tokens > request.num_prompt_tokens:
        raise PullCorrupted(
            f"the hand-over has {handoff.num_cached_tokens} cached tokens, "
            f"the prompt has {request.num_prompt_tokens}"
        )
    if handoff.stop_string is not None and handoff.stop_string not in request.sampling.stop_strings:
        raise PullCorrupted(
            f"the hand-over stops at {handoff.stop_string!r}, the request at {request.sampling.stop_strings}"
        )
    logprobs = _logprobs_of_last(len(new), request, handoff, vocab_size=vocab_size)
    tokens = [SampledToken(token_id, each) for token_id, each in zip(new, logprobs, strict=True)]
    if tokens:
        tokens[-1] = replace(tokens[-1], stop_string=handoff.stop_string)
    return tokens


def check_prefilled(
    request: Request, handoff: Handoff, tokens: Sequence[SampledToken], *, eos_token_ids: frozenset[int]
) -> None:
    """`PullCorrupted` unless the hand-over is of this whole prompt and ends with a new token, and its text as it says.

    Why the request ends here is decided here: a source may have had less room than we have.
    """
    num_expected = request.num_tokens + len(tokens) - 1
    if not tokens:
        raise PullCorrupted("the hand-over has no token that is new")
    if handoff.num_computed_tokens != num_expected or num_pages_for(num_expected) != len(request.page_ids):
        raise PullCorrupted(
            f"the hand-over has {handoff.num_computed_tokens} computed tokens, expected are {num_expected} "
            f"in {len(request.page_ids)} pages"
        )
    if handoff.finish_reason not in (None, FinishReason.STOP, FinishReason.LENGTH):
        raise PullCorrupted(f"the hand-over ends with {handoff.finish_reason}")
    num_outputs = len(request.output_token_ids) + len(tokens)
    if handoff.finish_reason is FinishReason.STOP and not ends_text(
        request.sampling, tokens[-1], num_outputs, eos_token_ids=eos_token_ids
    ):
        raise PullCorrupted(
            f"the hand-over stops at token {tokens[-1].token_id}, with which no text of the request ends"
        )


def _logprobs_of_last(
    num_tokens: int, request: Request, handoff: Handoff, *, vocab_size: int
) -> Sequence[TokenLogprobs | None]:
    """Of so many last tokens; None for each if the request asks for none."""
    num_wanted = request.sampling.num_logprobs
    if num_wanted is None:
        return [None] * num_tokens
    logprobs = handoff.logprobs[max(0, len(handoff.logprobs) - num_tokens) :]
    if len(logprobs) < num_tokens:
        raise PullCorrupted(f"the hand-over has {len(logprobs)} logprobs for {num_tokens} tokens")
    for each in logprobs:
        if len(each.top) > num_wanted:
            raise PullCorrupted(f"the hand-over has {len(each.top)} top tokens, asked for are {num_wanted}")
        if not all(0 <= token_id < vocab_size for token_id, _ in each.top):
            raise PullCorrupted(f"the hand-over has top tokens {each.top}, the vocabulary has {vocab_size}")
    return logprobs
