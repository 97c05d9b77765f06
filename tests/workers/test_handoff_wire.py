import contextlib

from hypothesis import given
from hypothesis import strategies as st

from workers.errors import PullCorrupted
from workers.handoff_wire import decode_handoff, encode_handoff
from workers.request import (
    FinishReason,
    Handoff,
    TokenLogprobs,
)

TOKENS = st.integers(0, 2**32 - 1)
LOGPROBS = st.floats(max_value=0.0, width=32)


@given(
    num_computed=TOKENS,
    outputs=st.lists(TOKENS, max_size=5),
    logprobs=st.lists(st.tuples(LOGPROBS, st.lists(st.tuples(TOKENS, LOGPROBS), max_size=3)), max_size=5),
    reason=st.sampled_from([None, *FinishReason]),
    stop_string=st.none() | st.text(min_size=1),
)
def test_a_handoff_comes_back_as_it_was(
    num_computed: int,
    outputs: list[int],
    logprobs: list[tuple[float, list[tuple[int, float]]]],
    reason: FinishReason | None,
    stop_string: str | None,
) -> None:
    handoff = Handoff(
        num_computed_tokens=num_computed,
        output_token_ids=tuple(outputs),
        logprobs=tuple(TokenLogprobs(value, tuple(top)) for value, top in logprobs[: len(outputs)]),
        finish_reason=reason,
        stop_string=stop_string,
    )
    assert decode_handoff(encode_handoff(handoff)) == handoff


@given(data=st.binary(max_size=60))
def test_random_bytes_are_a_handoff_or_a_typed_error(data: bytes) -> None:
    with contextlib.suppress(PullCorrupted):
        assert isinstance(decode_handoff(data), Handoff)
