import pytest

from control_plane.gateway.token_merge import BadSequence, TokenMerge, joined
from control_plane.gateway.wire import Outcome, WorkerOutput
from control_plane.generation import FinishReason, TokenChunk, TokenLogprobs, WorkerEvent


def output(first: int, *token_ids: int, **fields: object) -> WorkerOutput:
    return WorkerOutput(first_token_number=first, token_ids=token_ids, **fields)


def make_merge(*, max_tokens: int = 100) -> TokenMerge:
    return TokenMerge(max_tokens=max_tokens)


def test_a_token_that_two_workers_send_is_given_once() -> None:
    merge = make_merge()
    assert merge.add(output(0, 7)) == TokenChunk(token_ids=(7,))
    assert merge.add(output(0, 7)) is None
    assert merge.add(output(0, 7, 8, 9)) == TokenChunk(token_ids=(8, 9))
    assert merge.token_ids == [7, 8, 9]


def test_a_missing_token_is_an_error_that_names_it() -> None:
    merge = make_merge()
    merge.add(output(0, 7))
    with pytest.raises(BadSequence, match="token 1 is missing before token 2"):
        merge.add(output(2, 9))


def test_an_end_beyond_a_missing_token_is_an_error() -> None:
    with pytest.raises(BadSequence, match="token 0 is missing"):
        make_merge().add(output(3, outcome=Outcome.STOP))


def test_logprobs_are_dropped_with_their_tokens() -> None:
    merge = make_merge()
    merge.add(output(0, 7))
    chunk = merge.add(output(0, 7, 8, logprobs=(TokenLogprobs(-1.0), TokenLogprobs(-2.0))))
    assert chunk == TokenChunk(token_ids=(8,), logprobs=(TokenLogprobs(-2.0),))


def test_logprobs_that_do_not_belong_to_the_tokens_are_an_error() -> None:
    with pytest.raises(BadSequence, match="2 tokens came with 1 logprobs"):
        make_merge().add(output(0, 7, 8, logprobs=(TokenLogprobs(-1.0),)))


def test_more_tokens_than_were_asked_for_are_an_error() -> None:
    with pytest.raises(BadSequence, match="2 tokens were asked for"):
        make_merge(max_tokens=2).add(output(0, 1, 2, 3))


def test_an_end_without_a_new_token_is_still_the_end() -> None:
    merge = make_merge()
    merge.add(output(0, 7, num_cached_tokens=16))
    assert merge.add(output(0, 7, outcome=Outcome.STOP, stop_string="x")) == TokenChunk(
        token_ids=(), finish_reason=FinishReason.STOP, stop_string="x", num_cached_tokens=16
    )


def test_events_of_an_output_that_repeats_tokens_come_with_the_next_chunk() -> None:
    begun, ended = (WorkerEvent("queued", 1.0),), (WorkerEvent("queued", 1.0), WorkerEvent("finished", 2.0))
    merge = make_merge()
    merge.add(output(0, 7))
    assert merge.add(output(0, 7, events=begun)) is None
    chunks = [merge.add(output(1, 8)), merge.add(output(2, 9)), merge.add(output(3, 10, events=ended))]
    assert [chunk.events for chunk in chunks if chunk is not None] == [begun, (), ended]
    assert joined([chunk for chunk in chunks[:2] if chunk is not None]).events == begun
    assert joined([chunk for chunk in chunks if chunk is not None]).events == ended


def test_joined_chunks_say_what_they_said_apart() -> None:
    first = TokenChunk(token_ids=(1,), logprobs=(TokenLogprobs(-1.0),))
    last = TokenChunk(
        token_ids=(2, 3),
        logprobs=(TokenLogprobs(-2.0), TokenLogprobs(-3.0)),
        finish_reason=FinishReason.STOP,
        stop_string="x",
        num_cached_tokens=4,
    )
    assert joined([first]) is first
    assert joined([first, last]) == TokenChunk(
        token_ids=(1, 2, 3),
        logprobs=(TokenLogprobs(-1.0), TokenLogprobs(-2.0), TokenLogprobs(-3.0)),
        finish_reason=FinishReason.STOP,
        stop_string="x",
        num_cached_tokens=4,
    )
