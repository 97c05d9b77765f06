"""What a request says: its new tokens, its end, and why it ends. Pure."""

from collections.abc import Sequence

from workers import timeline
from workers.request import FinishReason, Request, RequestOutput, SamplingParams, TokenLogprobs
from workers.step import SampledToken


def finish_reason(
    request: Request, last: SampledToken, *, eos_token_ids: frozenset[int], max_tokens: int
) -> FinishReason | None:
    """Why the request ends with its last token, if it does; `max_tokens` bounds prompt and output together."""
    num_output_tokens = len(request.output_token_ids)
    if ends_text(request.sampling, last, num_output_tokens, eos_token_ids=eos_token_ids):
        return FinishReason.STOP
    if has_full_length(
        request.sampling,
        num_output_tokens=num_output_tokens,
        num_tokens=request.num_tokens,
        max_tokens=max_tokens,
    ):
        return FinishReason.LENGTH
    return None


def has_full_length(
    sampling: SamplingParams, *, num_output_tokens: int, num_tokens: int, max_tokens: int
) -> bool:
    """Whether so many tokens, of the output and all in all, are all that the request may have."""
    return num_output_tokens >= sampling.max_tokens or num_tokens >= max_tokens


def ends_text(
    sampling: SamplingParams, last: SampledToken, num_output_tokens: int, *, eos_token_ids: frozenset[int]
) -> bool:
    """Whether the text ends with this token, the last of so many."""
    return num_output_tokens > sampling.min_tokens and (
        last.stop_string is not None
        or last.token_id in sampling.stop_token_ids
        or (last.token_id in eos_token_ids and not sampling.ignore_eos)
    )


def logprobs_of(tokens: Sequence[SampledToken]) -> tuple[TokenLogprobs, ...]:
    return tuple(token.logprobs for token in tokens if token.logprobs is not None)


def new_tokens_output(
    request: Request, tokens: Sequence[SampledToken], *, is_first: bool, reason: FinishReason | None
) -> RequestOutput:
    """Of tokens that are at the end of the request's output already."""
    return RequestOutput(
        request_id=request.request_id,
        session_id=request.session_id,
        first_token_number=len(request.output_token_ids) - len(tokens),
        token_ids=tuple(token.token_id for token in tokens),
        logprobs=logprobs_of(tokens),
        finish_reason=reason,
        stop_string=None if reason is None else tokens[-1].stop_string,
        num_cached_tokens=request.num_cached_tokens,
        timeline=tuple(request.timeline.stamps) if is_first or reason is not None else (),
    )


def end_output(request: Request, reason: FinishReason, *, now_s: float) -> RequestOutput:
    """The last word of a request that ends without a token."""
    request.timeline.stamp(timeline.FINISHED, now_s)
    return RequestOutput(
        request_id=request.request_id,
        session_id=request.session_id,
        first_token_number=len(request.output_token_ids),
        finish_reason=reason,
        num_cached_tokens=request.num_cached_tokens,
        timeline=tuple(request.timeline.stamps),
    )
