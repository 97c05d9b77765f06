import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.request import Request, RequestId, SamplingParams, SessionId

TOKENS = st.lists(st.integers(0, 99), max_size=8)


@given(prompt=TOKENS, output=TOKENS, start=st.integers(0, 20), stop=st.integers(0, 20))
def test_a_token_range_is_a_slice_of_prompt_and_output_together(
    prompt: list[int], output: list[int], start: int, stop: int
) -> None:
    request = Request(
        request_id=RequestId("r"),
        session_id=SessionId(0),
        prompt_token_ids=prompt,
        output_token_ids=output,
        sampling=SamplingParams(),
        arrival_s=0.0,
    )
    assert request.num_tokens == len(prompt) + len(output)
    assert request.token_range(start, stop) == (prompt + output)[start:stop]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 1.1),
        ("min_p", math.inf),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", -1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("min_tokens", 17),  # more than the default of max_tokens
        ("num_logprobs", 21),
        ("logit_bias", ((3, 101.0),)),
    ],
)
def test_a_sampling_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("stop_strings", [("",), tuple("abcdefghijklmnopq")])
def test_empty_and_too_many_stop_strings_are_refused(stop_strings: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="stop"):
        SamplingParams(stop_strings=stop_strings)
