"""What a source may say of a request that it hands over, and what is not believed."""

from dataclasses import replace
from typing import Any

import pytest

from workers.errors import PullCorrupted
from workers.moves import moved_tokens
from workers.request import (
    FinishReason,
    Handoff,
    PageId,
    Request,
    RequestId,
    SamplingParams,
    SessionId,
    TokenLogprobs,
)
from workers.step import SampledToken
from workers.validation import check_prefilled, handed_over_tokens

VOCAB_SIZE, EOS, STOP_TOKEN = 100, 1, 50
LOGPROBS = TokenLogprobs(-0.5, top=((7, -0.5), (8, -1.5)))


def request(**sampling: Any) -> Request:
    """20 tokens of prompt and one of output, in two pages."""
    wanted = {"max_tokens": 9, "num_logprobs": 2, "stop_strings": ("end",), "stop_token_ids": (STOP_TOKEN,)}
    return Request(
        request_id=RequestId("r"),
        session_id=SessionId(1),
        prompt_token_ids=[5] * 20,
        output_token_ids=[9],
        sampling=SamplingParams(**(wanted | sampling)),
        arrival_s=0.0,
        page_ids=(PageId(0), PageId(1)),
    )


HANDOFF = Handoff(num_computed_tokens=21, output_token_ids=(9, 7), logprobs=(LOGPROBS,), num_cached_tokens=20)
# With these no request of ours can have been left, wherever it ran.
LIES = [
    ({"output_token_ids": (8, 7)}, "known are"),
    ({"output_token_ids": (9, VOCAB_SIZE)}, "the vocabulary has 100"),
    ({"num_cached_tokens": 21}, "21 cached tokens, the prompt has 20"),
    ({"stop_string": "another"}, "stops at 'another'"),
    ({"logprobs": ()}, "0 logprobs for 1 tokens"),
    ({"logprobs": (replace(LOGPROBS, top=3 * LOGPROBS.top),)}, "6 top tokens, asked for are 2"),
    ({"logprobs": (TokenLogprobs(-0.5, top=((VOCAB_SIZE, -1.0),)),)}, "the vocabulary has 100"),
    ({"finish_reason": FinishReason.ERROR}, "ends with"),
    ({"finish_reason": FinishReason.HANDED_OVER}, "ends with"),
]  # fmt: skip


def prefilled(handoff: Handoff, of: Request) -> list[SampledToken]:
    tokens = handed_over_tokens(of, handoff, vocab_size=VOCAB_SIZE)
    check_prefilled(of, handoff, tokens, eos_token_ids=frozenset({EOS}))
    return tokens


def moved(handoff: Handoff, of: Request) -> list[SampledToken]:
    return moved_tokens(of, handoff, vocab_size=VOCAB_SIZE)


def test_the_tokens_that_are_new_come_with_their_logprobs() -> None:
    assert prefilled(HANDOFF, request()) == moved(HANDOFF, request()) == [SampledToken(7, LOGPROBS)]


@pytest.mark.parametrize(("lie", "complaint"), LIES)
def test_a_lie_about_a_prefilled_request_is_refused(lie: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PullCorrupted, match=complaint):
        prefilled(replace(HANDOFF, **lie), request())


@pytest.mark.parametrize(
    ("lie", "complaint"),
    [
        *LIES,
        ({"finish_reason": FinishReason.STOP}, "what has ended does not move"),
        ({"stop_string": "end"}, "what has ended does not move"),
    ],
)
def test_a_lie_about_a_request_that_moves_is_refused(lie: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PullCorrupted, match=complaint):
        moved(replace(HANDOFF, **lie), request())


def test_a_text_stops_only_with_what_stops_it() -> None:
    stopped = replace(HANDOFF, finish_reason=FinishReason.STOP)
    with pytest.raises(PullCorrupted, match="stops at token 7, with which no text of the request ends"):
        prefilled(stopped, request())
    for token_id, stop_string in ((EOS, None), (STOP_TOKEN, None), (7, "end")):
        said = replace(stopped, output_token_ids=(9, token_id), stop_string=stop_string)
        assert prefilled(said, request())[-1].token_id == token_id
        with pytest.raises(PullCorrupted, match="no text of the request ends"):
            prefilled(said, request(min_tokens=2))
    with pytest.raises(PullCorrupted, match="no text of the request ends"):
        prefilled(replace(stopped, output_token_ids=(9, EOS)), request(ignore_eos=True))


def test_a_source_with_less_room_may_say_that_the_request_is_too_long() -> None:
    assert prefilled(replace(HANDOFF, finish_reason=FinishReason.LENGTH), request())
