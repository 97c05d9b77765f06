"""What the state does at both ends of a hand-over and of a move."""

from dataclasses import replace

import pytest

from tests.workers.stepping import EOS, SOURCE, new_request, new_state, step
from workers import timeline
from workers.errors import PullCorrupted
from workers.request import (
    FinishReason,
    Handoff,
    Purpose,
    RequestId,
    SamplingParams,
    TokenLogprobs,
)
from workers.step import SampledToken
from workers.timeline import Stamp

# Hand-over, source side.


def test_a_request_for_another_worker_is_held_until_it_is_released() -> None:
    state = new_state()
    state.add(new_request(prompt=[1] * 100, purpose=Purpose.PREFILL_ONLY), now_s=0.0)
    step(state)
    (progress,) = state.export_progress()
    assert (progress.num_computed_tokens, len(progress.page_ids), progress.handoff) == (64, 7, None)
    (output,) = step(state, 42)
    assert (output.token_ids, output.finish_reason) == ((42,), None)
    (progress,) = state.export_progress()
    assert progress.handoff is not None
    assert (progress.handoff.num_computed_tokens, progress.handoff.output_token_ids) == (100, (42,))
    assert progress.handoff.timeline == output.timeline
    assert output.timeline[-1].name == timeline.FIRST_TOKEN
    assert step(state) == ()
    assert state.load().num_leases == 1
    end = state.release(RequestId("r"), now_s=0.0)
    assert end is not None
    assert (end.finish_reason, end.token_ids, end.first_token_number) == (FinishReason.HANDED_OVER, (), 1)
    assert state.release(RequestId("r"), now_s=0.0) is None
    assert state.export_progress() == ()
    assert state.load().num_free_pages == 100


def test_a_request_that_ends_with_its_first_token_says_so_in_the_hand_over_alone() -> None:
    state = new_state()
    sampling = SamplingParams(max_tokens=9, num_logprobs=0)
    state.add(new_request(purpose=Purpose.PREFILL_ONLY, sampling=sampling), now_s=0.0)
    assert step(state, SampledToken(EOS, TokenLogprobs(-0.5), stop_string="x")) == ()
    (progress,) = state.export_progress()
    assert progress.handoff is not None
    assert replace(progress.handoff, timeline=()) == Handoff(
        num_computed_tokens=3,
        output_token_ids=(EOS,),
        logprobs=(TokenLogprobs(-0.5),),
        finish_reason=FinishReason.STOP,
        stop_string="x",
    )


# Moves.


def test_a_request_is_not_frozen_while_a_thread_may_write_to_its_pages() -> None:
    state, r = new_state(), RequestId("r")
    state.add(new_request(prompt=[1] * 200), now_s=0.0)
    region = state.loads.open(r, first_block=6, end_block=9, now_s=0.0)
    assert region is not None
    step(state)
    assert state.open_move(r, num_pages=20)
    assert not state.freeze(r, now_s=0.0)
    state.check()
    state.loads.fail(r, region, region.placed_block, now_s=0.0)  # nothing of it comes any more
    assert state.freeze(r, now_s=0.0)
    assert not state.freeze(r, now_s=0.0)
    state.check()


# Hand-over, destination side.


def test_a_pulled_request_repeats_the_first_token_and_goes_on() -> None:
    state = new_state()
    state.add(new_request(prompt=[1] * 40, kv_source=SOURCE), now_s=0.0)
    assert step(state) == ()
    handoff = Handoff(num_computed_tokens=40, output_token_ids=(7,), num_cached_tokens=16)
    output = state.pull_succeeded(RequestId("r"), handoff, now_s=0.0)
    state.check()
    assert output is not None
    assert (output.first_token_number, output.token_ids, output.num_cached_tokens) == (0, (7,), 16)
    assert len(state.take_block_events().stored) == 2
    assert step(state, 8)[0].first_token_number == 1


def test_a_pulled_request_goes_on_with_the_timeline_of_its_source() -> None:
    state = new_state()
    state.add(new_request(prompt=[1] * 40, kv_source=SOURCE), now_s=1.0)
    step(state, now_s=2.0)
    noted = (Stamp(timeline.SCHEDULED, 1.5), Stamp(timeline.PREFILL_DONE, 3.5))
    handoff = Handoff(num_computed_tokens=40, output_token_ids=(7,), timeline=noted)
    output = state.pull_succeeded(RequestId("r"), handoff, now_s=4.0)
    assert output is not None
    assert [(stamp.name, stamp.unix_s) for stamp in output.timeline[2:]] == [
        ("scheduled", 2.0),
        ("pull_started", 2.0),
        ("prefill.scheduled", 1.5),
        ("prefill.prefill_done", 3.5),
        ("pull_done", 4.0),
        ("prefill_done", 4.0),
        ("first_token", 4.0),
    ]


@pytest.mark.parametrize(
    ("sampling", "reason", "stop_string", "expected"),
    [
        (SamplingParams(max_tokens=9, stop_strings=("x",)), FinishReason.STOP, "x", FinishReason.STOP),
        (SamplingParams(max_tokens=9, stop_strings=("x",)), None, "x", FinishReason.STOP),
        (SamplingParams(max_tokens=1), None, None, FinishReason.LENGTH),
    ],
)
def test_a_request_that_ended_at_the_source_ends_here_at_once(
    sampling: SamplingParams, reason: FinishReason | None, stop_string: str | None, expected: FinishReason
) -> None:
    state = new_state()
    state.add(new_request(sampling=sampling, kv_source=SOURCE), now_s=0.0)
    step(state)
    handoff = Handoff(
        num_computed_tokens=3, output_token_ids=(7,), finish_reason=reason, stop_string=stop_string
    )
    output = state.pull_succeeded(RequestId("r"), handoff, now_s=0.0)
    assert output is not None
    assert (output.finish_reason, output.token_ids, output.stop_string) == (expected, (7,), stop_string)
    assert state.num_requests == 0


@pytest.mark.parametrize(
    "handoff",
    [
        Handoff(num_computed_tokens=2, output_token_ids=(9, 7), logprobs=(TokenLogprobs(0.0),)),
        Handoff(num_computed_tokens=4, output_token_ids=(9,), logprobs=(TokenLogprobs(0.0),)),
        Handoff(num_computed_tokens=4, output_token_ids=(8, 7), logprobs=(TokenLogprobs(0.0),)),
        Handoff(num_computed_tokens=4, output_token_ids=(9, 10_000), logprobs=(TokenLogprobs(0.0),)),
        Handoff(num_computed_tokens=4, output_token_ids=(9, 7)),
    ],
)
def test_a_hand_over_that_does_not_fit_the_request_is_refused_and_the_prompt_computed(
    handoff: Handoff,
) -> None:
    state = new_state()
    sampling = SamplingParams(max_tokens=9, num_logprobs=0)
    state.add(new_request(output=(9,), sampling=sampling, kv_source=SOURCE), now_s=0.0)
    step(state)
    with pytest.raises(PullCorrupted):
        state.pull_succeeded(RequestId("r"), handoff, now_s=0.0)
    state.check()
    state.pull_failed(RequestId("r"), now_s=0.0)
    assert step(state, 5)[0].first_token_number == 1
