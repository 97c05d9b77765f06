import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import kv_pb2
from workers.errors import PullCorrupted
from workers.handoff_wire import MAX_STAMPS, decode_handoff, encode_handoff, stamps_to_wire
from workers.request import (
    FinishReason,
    Handoff,
    TokenLogprobs,
)
from workers.timeline import Stamp

TOKENS = st.integers(0, 2**32 - 1)
LOGPROBS = st.floats(max_value=0.0, width=32)


@given(
    num_computed=TOKENS,
    exact_share=st.none() | st.floats(0.0, 1.0),
    outputs=st.lists(TOKENS, max_size=5),
    logprobs=st.lists(st.tuples(LOGPROBS, st.lists(st.tuples(TOKENS, LOGPROBS), max_size=3)), max_size=5),
    reason=st.sampled_from([None, *FinishReason]),
    stop_string=st.none() | st.text(min_size=1),
    events=st.lists(
        st.tuples(st.text(max_size=64), st.floats(allow_nan=False, allow_infinity=False)), max_size=3
    ),
)
def test_a_handoff_comes_back_as_it_was(
    num_computed: int,
    exact_share: float | None,
    outputs: list[int],
    logprobs: list[tuple[float, list[tuple[int, float]]]],
    reason: FinishReason | None,
    stop_string: str | None,
    events: list[tuple[str, float]],
) -> None:
    handoff = Handoff(
        num_computed_tokens=num_computed,
        num_exact_tokens=None if exact_share is None else int(exact_share * num_computed),
        output_token_ids=tuple(outputs),
        logprobs=tuple(TokenLogprobs(value, tuple(top)) for value, top in logprobs[: len(outputs)]),
        finish_reason=reason,
        stop_string=stop_string,
        timeline=tuple(Stamp(name, unix_s) for name, unix_s in events),
    )
    assert decode_handoff(encode_handoff(handoff)) == handoff


@given(data=st.binary(max_size=60))
def test_random_bytes_are_a_handoff_or_a_typed_error(data: bytes) -> None:
    with contextlib.suppress(PullCorrupted):
        assert isinstance(decode_handoff(data), Handoff)


@pytest.mark.parametrize("unix_s", [math.nan, math.inf])
def test_an_event_at_no_time_is_refused(unix_s: float) -> None:
    handoff = Handoff(num_computed_tokens=1, output_token_ids=(1,), timeline=(Stamp("scheduled", unix_s),))
    with pytest.raises(PullCorrupted, match="'scheduled' happened at"):
        decode_handoff(encode_handoff(handoff))


def test_more_exact_tokens_than_tokens_are_refused() -> None:
    handoff = Handoff(num_computed_tokens=16, num_exact_tokens=17, output_token_ids=(1,))
    with pytest.raises(PullCorrupted, match="17 of 16 tokens are exact"):
        decode_handoff(encode_handoff(handoff))


def test_a_timeline_without_end_is_cut_by_who_sends_it_and_refused_by_who_gets_it() -> None:
    stamps = tuple(Stamp("preempted", float(number)) for number in range(20_000))
    sent = encode_handoff(Handoff(num_computed_tokens=1, output_token_ids=(1,), timeline=stamps))
    assert decode_handoff(sent).timeline == stamps[:MAX_STAMPS]
    lie = kv_pb2.HandoffState(timeline=stamps_to_wire(stamps))
    with pytest.raises(PullCorrupted, match="a timeline of 20000 events"):
        decode_handoff(lie.SerializeToString())


def test_an_event_with_a_name_without_end_is_refused() -> None:
    handoff = Handoff(num_computed_tokens=1, output_token_ids=(1,), timeline=(Stamp("x" * 65, 0.0),))
    with pytest.raises(PullCorrupted, match="an event of 65 characters"):
        decode_handoff(encode_handoff(handoff))


@pytest.mark.parametrize("logprobs", [TokenLogprobs(math.nan), TokenLogprobs(-1.0, top=((3, math.nan),))])
def test_a_logprob_that_is_no_number_is_refused(logprobs: TokenLogprobs) -> None:
    handoff = Handoff(num_computed_tokens=1, output_token_ids=(1,), logprobs=(logprobs,))
    with pytest.raises(PullCorrupted, match="NaN"):
        decode_handoff(encode_handoff(handoff))
