"""Requests that move from one worker to another while they run: who may, when the source stops, what comes along. Pure.

    source   running ──▶ running, its full blocks are pulled ──▶ frozen ──▶ finished, once the puller has it
                                                                    └──▶ running again, if the move breaks off
    target   pulling ────────────────────────────────────────────────▶ running

Finished blocks never change, so they travel while the source goes on. When the puller has caught up with it, or the
request is about to outgrow the puller's room, it is frozen between two steps; what then travels is the last block and
the request's state. All of that state is here: a draw depends on the seed and the token's number alone, penalties and
stop strings on the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.blocks import BLOCK_SIZE_TOKENS
from workers.errors import PullCorrupted
from workers.pages import num_pages_for
from workers.request import Handoff, Purpose, Request, Status, TokenLogprobs
from workers.step import SampledToken
from workers.validation import handed_over_tokens

# What a request may grow while its blocks travel: a second of fast decoding, or, of a long one, for which they travel
# for longer, an eighth.
_LEAST_ROOM_TOKENS = 64
_ROOM_SHARE = 8
# Log-probabilities that come along: of what the gateway may not have heard yet, which is what the room is for.
MAX_LOGPROBS = 1024


def pages_for_move(request: Request, *, num_available: int) -> int:
    """That a puller reserves for a request that moves to it: for what it knows of it, and for what it may grow.

    The latter as far as there is room: nobody who waits is overtaken, so one that asked for more would hold up all.
    """
    growth = max(_LEAST_ROOM_TOKENS, request.num_tokens // _ROOM_SHARE)
    most = request.num_prompt_tokens + request.sampling.max_tokens
    wanted = num_pages_for(min(request.num_tokens + growth, most))
    return min(wanted, max(num_available, num_pages_for(request.num_tokens + 1)))


def can_move(request: Request, *, num_pages: int) -> bool:
    """Whether the request may go where there is room for `num_pages` blocks: it generates, and does not move yet."""
    return (
        request.purpose is Purpose.GENERATE
        and request.status in (Status.WAITING, Status.RUNNING)
        and request.kv_source is None
        and not request.is_moving
        and num_pages_for(request.num_tokens) <= num_pages
    )


@dataclass(frozen=True, slots=True)
class Room:
    """What a puller has for a request, and how long that was when it came."""

    num_pages: int
    num_known_tokens: int


def must_freeze(request: Request, room: Room) -> bool:
    """Whether one block more may be too many for the puller's room, or its log-probabilities for what comes along."""
    num_new_tokens = request.num_tokens - room.num_known_tokens
    is_full = num_pages_for(request.num_tokens + 1) >= room.num_pages
    return is_full or (request.sampling.num_logprobs is not None and num_new_tokens >= MAX_LOGPROBS // 2)


def keep_logprobs(request: Request, logprobs: Sequence[TokenLogprobs]) -> None:
    """Of its newest tokens, as many as could come along: 20 alternatives a token are 2.4 kB."""
    request.output_logprobs.extend(logprobs)
    if len(request.output_logprobs) > 2 * MAX_LOGPROBS:
        del request.output_logprobs[:-MAX_LOGPROBS]


def handoff_of(request: Request) -> Handoff:
    return Handoff(
        num_computed_tokens=request.num_computed_tokens,
        output_token_ids=tuple(request.output_token_ids),
        logprobs=tuple(request.output_logprobs[-MAX_LOGPROBS:]),
        num_cached_tokens=request.num_cached_tokens,
        num_exact_tokens=request.num_exact_tokens,
        timeline=tuple(request.timeline.stamps),
    )


def moved_tokens(request: Request, handoff: Handoff, *, vocab_size: int) -> list[SampledToken]:
    """The tokens that came out at the source since the request was submitted here; perhaps none.

    Raises PullCorrupted for a hand-over that is not of this request.
    """
    tokens = handed_over_tokens(request, handoff, vocab_size=vocab_size)
    if handoff.finish_reason is not None or handoff.stop_string is not None:
        raise PullCorrupted(
            f"the move ends with {handoff.finish_reason} at {handoff.stop_string!r}: what has ended does not move"
        )
    num_tokens = request.num_tokens + len(tokens)
    if handoff.num_computed_tokens >= num_tokens or num_pages_for(num_tokens) > len(request.page_ids):
        raise PullCorrupted(
            f"the move has {handoff.num_computed_tokens} computed tokens of {num_tokens}, "
            f"there is room for {len(request.page_ids) * BLOCK_SIZE_TOKENS}"
        )
    if len(handoff.output_token_ids) >= request.sampling.max_tokens:
        raise PullCorrupted(
            f"the move has {len(handoff.output_token_ids)} outputs, max_tokens is {request.sampling.max_tokens}"
        )
    return tokens
