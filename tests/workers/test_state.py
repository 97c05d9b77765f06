import math

import pytest

from kvstore.blocks import chain_keys, root_key
from tests.workers.stepping import EOS, LIMITS, SOURCE, new_request, new_state, step
from workers.errors import InvalidRequest, QueueFull
from workers.request import (
    FinishReason,
    Handoff,
    Purpose,
    Request,
    RequestId,
    SamplingParams,
    TokenLogprobs,
)
from workers.scheduler import schedule
from workers.step import SampledToken

# How requests end.


@pytest.mark.parametrize(
    ("sampling", "token", "expected"),
    [
        (SamplingParams(max_tokens=9), SampledToken(5), None),
        (SamplingParams(max_tokens=9), SampledToken(EOS), FinishReason.STOP),
        (SamplingParams(max_tokens=9, ignore_eos=True), SampledToken(EOS), None),
        (SamplingParams(max_tokens=9, stop_token_ids=(5,)), SampledToken(5), FinishReason.STOP),
        (
            SamplingParams(max_tokens=9, stop_token_ids=(5,), ignore_eos=True),
            SampledToken(5),
            FinishReason.STOP,
        ),
        (SamplingParams(max_tokens=9), SampledToken(5, stop_string="x"), FinishReason.STOP),
        (SamplingParams(max_tokens=9, min_tokens=1), SampledToken(EOS), None),
        (SamplingParams(max_tokens=9, min_tokens=1, stop_token_ids=(5,)), SampledToken(5), None),
        (SamplingParams(max_tokens=1), SampledToken(5), FinishReason.LENGTH),
        (SamplingParams(max_tokens=1), SampledToken(EOS), FinishReason.STOP),
    ],
)
def test_a_request_ends_for_the_first_reason_that_holds(
    sampling: SamplingParams, token: SampledToken, expected: FinishReason | None
) -> None:
    state = new_state()
    state.add(new_request(sampling=sampling), now_s=0.0)
    (output,) = step(state, token)
    assert output.finish_reason is expected
    assert output.token_ids == (token.token_id,)
    assert output.stop_string == token.stop_string
    assert state.num_requests == (1 if expected is None else 0)


def test_a_stop_token_counts_once_the_fewest_tokens_are_there() -> None:
    state = new_state()
    state.add(new_request(sampling=SamplingParams(max_tokens=9, min_tokens=2)), now_s=0.0)
    assert [step(state, EOS)[0].finish_reason for _ in range(3)] == [None, None, FinishReason.STOP]


def test_the_longest_model_input_ends_a_request() -> None:
    state = new_state(max_model_len=5)
    state.add(new_request(prompt=(1, 2, 3)), now_s=0.0)
    assert [step(state)[0].finish_reason for _ in range(2)] == [None, FinishReason.LENGTH]


def test_outputs_number_tokens_from_zero_and_carry_logprobs() -> None:
    state = new_state()
    state.add(new_request(sampling=SamplingParams(max_tokens=2, num_logprobs=0)), now_s=0.0)
    logprobs = TokenLogprobs(-1.5)
    first, second = step(state, SampledToken(7, logprobs)), step(state, SampledToken(8, logprobs))
    assert [(o.first_token_number, o.token_ids, o.logprobs) for o in (*first, *second)] == [
        (0, (7,), (logprobs,)),
        (1, (8,), (logprobs,)),
    ]


def test_a_request_resumed_elsewhere_goes_on_counting_from_the_tokens_it_brings() -> None:
    state = new_state()
    state.add(new_request(output=(4, 5), sampling=SamplingParams(max_tokens=4)), now_s=0.0)
    (first,), (second,) = step(state), step(state)
    assert (first.first_token_number, first.finish_reason) == (2, None)
    assert (second.first_token_number, second.finish_reason) == (3, FinishReason.LENGTH)


def test_the_timeline_tells_when_what_happened() -> None:
    state = new_state()
    state.add(
        new_request(prompt=[1] * 100, arrival_s=10.0, sampling=SamplingParams(max_tokens=2)), now_s=11.0
    )
    step(state, step_s=0.5, now_s=12.0)
    step(state, step_s=0.5, now_s=13.0)
    (output,) = step(state, step_s=0.5, now_s=14.0)
    assert [(stamp.name, stamp.unix_s) for stamp in output.timeline] == [
        ("received", 10.0),
        ("queued", 11.0),
        ("scheduled", 11.5),
        ("first_chunk", 12.0),
        ("prefill_done", 13.0),
        ("first_token", 13.0),
        ("finished", 14.0),
    ]


def test_the_first_tokens_and_the_end_carry_the_timeline_and_nothing_in_between_does() -> None:
    state = new_state()
    state.add(new_request(sampling=SamplingParams(max_tokens=4)), now_s=0.0)
    timelines = [step(state)[0].timeline for _ in range(4)]
    assert [bool(each) for each in timelines] == [True, False, False, True]
    assert timelines[3][:-1] == timelines[0]


# What is refused.


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (new_request("taken"), "in use"),
        (new_request(prompt=()), "no tokens"),
        (new_request(prompt=[1] * 64), "64 tokens; at most 63 fit"),
        (new_request(prompt=(1, 10_000)), "10000 is not in the vocabulary"),
        (new_request(prompt=(-1,)), "-1 is not in the vocabulary"),
        (new_request(output=(10_000,)), "10000 is not in the vocabulary"),
        (new_request(sampling=SamplingParams(logit_bias=((10_000, 1.0),))), "10000 is not in the vocabulary"),
        (new_request(output=(1,), sampling=SamplingParams(max_tokens=1)), "max_tokens is 1"),
        (new_request(purpose=Purpose.PREFILL_ONLY, kv_source=SOURCE), "kv_source"),
        (new_request(arrival_s=math.nan), "arrival_s"),
    ],
)
def test_a_request_that_cannot_run_here_is_refused_and_changes_nothing(
    request_: Request, message: str
) -> None:
    state = new_state(num_pages=4)
    state.add(new_request("taken"), now_s=0.0)
    with pytest.raises(InvalidRequest, match=message):
        state.add(request_, now_s=0.0)
    assert state.num_requests == 1
    state.check()


def test_a_full_queue_says_when_to_try_again() -> None:
    state = new_state(max_num_waiting=1)
    state.add(new_request("r0"), now_s=0.0)
    with pytest.raises(QueueFull, match="1 requests are waiting") as caught:
        state.add(new_request("r1"), now_s=0.0)
    assert caught.value.retry_after_s > 0
    step(state)
    state.add(new_request("r1"), now_s=0.0)
    assert state.load().num_waiting == 1


# Prefix reuse.


def test_only_computed_blocks_are_cached_and_reported() -> None:
    state = new_state()
    prompt = list(range(1, 41))
    state.add(new_request(prompt=prompt), now_s=0.0)
    assert state.take_block_events().stored == ()
    step(state)
    keys = tuple(chain_keys(root_key(model_fingerprint=b"model"), prompt))
    assert state.take_block_events().stored == keys
    for _ in range(7):
        step(state, 9)
    assert state.take_block_events().stored == ()
    step(state, 9)  # computes the 48th token
    keys = tuple(chain_keys(root_key(model_fingerprint=b"model"), [*prompt, 1, *[9] * 7]))
    assert state.take_block_events().stored == keys[2:]
    assert state.take_block_snapshot() == keys


def test_blocks_are_not_shared_between_salts() -> None:
    state = new_state()
    prompt = list(range(1, 41))
    num_cached = []
    for number, salt in enumerate(("", "", "a", "b", "a")):
        request = new_request(
            f"r{number}", prompt=prompt, cache_salt=salt, sampling=SamplingParams(max_tokens=1)
        )
        state.add(request, now_s=0.0)
        num_cached += [output.num_cached_tokens for output in step(state)]
    assert num_cached == [0, 32, 0, 0, 32]


# Steps that break off.


def test_blocks_that_a_broken_off_step_may_have_overwritten_are_not_cached_any_more() -> None:
    state = new_state(num_pages=4)
    prompt = list(range(1, 49))
    state.add(new_request("first", prompt=prompt, sampling=SamplingParams(max_tokens=1)), now_s=0.0)
    step(state)
    state.take_block_events()
    state.add(new_request("second", prompt=[9] * 40), now_s=0.0)
    plan = schedule(state.view(), LIMITS)
    state.begin(plan, now_s=0.0)
    state.step_failed(plan)
    state.check()
    # One page was free; the other two held the last blocks of the first request.
    keys = tuple(chain_keys(root_key(model_fingerprint=b"model"), prompt))
    assert set(state.take_block_events().removed) == set(keys[1:])
    # The request itself is where it was, and can be tried again or aborted.
    assert [output.request_id for output in step(state)] == ["second"]


def test_a_request_preempted_by_a_broken_off_step_is_recomputed() -> None:
    state = new_state(num_pages=4)
    for number in range(2):
        state.add(new_request(f"r{number}", prompt=[number + 1] * 15, arrival_s=float(number)), now_s=0.0)
    plan = schedule(state.view(), LIMITS)
    while not plan.preempted:
        step(state)
        plan = schedule(state.view(), LIMITS)
    state.begin(plan, now_s=0.0)
    state.step_failed(plan)
    state.check()
    assert plan.preempted == ("r1",)
    assert [request.request_id for request in state.view().waiting] == ["r1"]
    state.abort(RequestId("r0"), now_s=0.0)
    # Only the first of its two blocks can be trusted: the page of the other one was given to r0.
    (row,) = schedule(state.view(), LIMITS).rows
    assert row.num_computed_tokens == 16


# Aborts.


def test_an_abort_frees_the_pages_whatever_the_request_was_doing() -> None:
    state = new_state()
    state.add(new_request("running"), now_s=0.0)
    state.add(new_request("held", purpose=Purpose.PREFILL_ONLY), now_s=0.0)
    step(state)
    state.add(new_request("waiting"), now_s=0.0)
    for name in ("running", "held", "waiting"):
        output = state.abort(RequestId(name), now_s=1.0)
        assert output is not None
        assert output.finish_reason is FinishReason.ABORT
        assert state.abort(RequestId(name), now_s=1.0) is None
    assert state.load().num_free_pages == 100


@pytest.mark.parametrize("succeeds", [True, False])
def test_pages_of_an_aborted_pull_are_kept_until_the_pull_has_ended(succeeds: bool) -> None:
    state = new_state()
    state.add(new_request(kv_source=SOURCE), now_s=0.0)
    step(state)
    output = state.abort(RequestId("r"), now_s=0.0)
    assert output is not None
    assert output.finish_reason is FinishReason.ABORT
    assert state.load().num_free_pages == 99
    with pytest.raises(InvalidRequest, match="in use"):
        state.add(new_request(), now_s=0.0)
    if succeeds:
        handoff = Handoff(num_computed_tokens=3, output_token_ids=(4,))
        assert state.pull_succeeded(RequestId("r"), handoff, now_s=0.0) is None
    else:
        state.pull_failed(RequestId("r"), now_s=0.0)
    assert state.load().num_free_pages == 100
    assert state.num_requests == 0


def test_the_load_counts_what_waits_and_what_is_free() -> None:
    state = new_state()
    state.add(new_request("prompt", prompt=[1] * 100), now_s=0.0)
    state.add(new_request("waits", prompt=[1] * 50), now_s=0.0)
    load = state.load()
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (0, 2, 150)
    step(state)
    load = state.load()
    assert (load.num_running, load.num_waiting, load.num_waiting_tokens) == (1, 1, 36 + 50)
    assert (load.num_pages, load.num_free_pages) == (100, 93)


def test_the_load_of_what_waits_is_without_what_it_loads_and_without_what_decodes_at_once() -> None:
    state = new_state()

    def num_waiting_tokens() -> int:
        state.check()
        return state.load().num_waiting_tokens

    state.add(new_request("one", prompt=[1]), now_s=0.0)
    assert num_waiting_tokens() == 0
    state.add(new_request("loads", prompt=[1] * 50), now_s=0.0)
    loads, request_id = state.loads, RequestId("loads")
    region = loads.open(request_id, first_block=0, end_block=3, now_s=0.0)
    assert region is not None
    assert num_waiting_tokens() == 2
    loads.shorten(request_id, region, 2)
    assert num_waiting_tokens() == 18
    loads.move(request_id, region, 1)
    assert num_waiting_tokens() == 34
    loads.fail(request_id, region, 2, now_s=0.0)
    assert num_waiting_tokens() == 50
    assert loads.open(request_id, first_block=0, end_block=2, now_s=0.0) is not None
    state.abort(request_id, now_s=0.0)
    assert num_waiting_tokens() == 0
