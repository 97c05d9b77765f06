"""What is decided about a step whose predecessor is still under way."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.workers.stepping import EOS, LIMITS, SOURCE, new_request, new_state, step
from workers.request import FinishReason, Purpose, Request, SamplingParams
from workers.scheduler import SchedulerLimits, schedule
from workers.state import EngineState
from workers.step import SampledToken, StepPlan, StepResult


def begun(state: EngineState, *requests: Request, limits: SchedulerLimits = LIMITS) -> StepPlan:
    """The plan of the step that begins now."""
    for request in requests:
        state.add(request, now_s=0.0)
    plan = schedule(state.view(), limits)
    state.begin(plan, now_s=0.0)
    return plan


def result(plan: StepPlan, token_ids: Sequence[int]) -> StepResult:
    return StepResult(
        sampled={
            row.request.request_id: SampledToken(token_id)
            for row, token_id in zip(plan.rows, token_ids, strict=True)
        }
    )


def test_every_request_gets_one_more_token_behind_the_one_that_nobody_knows_yet() -> None:
    state = new_state()
    plan = begun(state, new_request("a"), new_request("b", prompt=range(1, 21)))
    following = state.look_ahead(plan, LIMITS)
    assert following is not None
    assert [(row.num_computed_tokens, row.num_new_tokens, row.samples) for row in following.rows] == [
        (3, 1, True),
        (20, 1, True),
    ]
    assert [row.num_sampled_before for row in following.rows] == [1, 1]


def test_a_request_at_the_end_of_its_pages_gets_a_free_one() -> None:
    state = new_state(num_pages=3)
    plan = begun(state, new_request("a", prompt=range(1, 17)))
    following = state.look_ahead(plan, LIMITS)
    assert following is not None
    assert following.rows[0].page_ids[:1] == plan.rows[0].page_ids
    assert len(set(following.rows[0].page_ids)) == 2


def test_without_a_free_page_for_each_that_needs_one_nothing_is_looked_ahead() -> None:
    for num_pages, is_enough in ((3, False), (4, True)):
        state = new_state(num_pages=num_pages)
        plan = begun(state, *(new_request(name, prompt=[number] * 16) for number, name in enumerate("ab", 1)))
        assert len(plan.rows) == 2
        assert (state.look_ahead(plan, LIMITS) is not None) == is_enough


def test_one_that_has_all_its_tokens_with_this_step_has_no_row_in_the_next() -> None:
    state = new_state()
    last = new_request("last", sampling=SamplingParams(max_tokens=1))
    plan = begun(state, last, new_request("other"))
    following = state.look_ahead(plan, LIMITS)
    assert following is not None
    assert [row.request.request_id for row in following.rows] == ["other"]


def test_a_step_in_which_all_end_is_followed_by_nothing() -> None:
    state = new_state()
    assert state.look_ahead(begun(state, new_request(sampling=SamplingParams(max_tokens=1))), LIMITS) is None
    short = new_state(max_model_len=4)
    assert short.look_ahead(begun(short, new_request()), LIMITS) is None


@pytest.mark.parametrize(
    "other",
    [
        new_request("for another worker", purpose=Purpose.PREFILL_ONLY),
        new_request("its last chunk is next", purpose=Purpose.PREFILL_ONLY, prompt=range(1, 60)),
        new_request("pulls", prompt=range(1, 40), kv_source=SOURCE),
    ],
    ids=lambda request: request.request_id,
)
def test_beside_what_others_have_a_part_in_nothing_is_looked_ahead(other: Request) -> None:
    state, limits = new_state(), replace(LIMITS, max_num_batched_tokens=50)
    state.add(new_request(), now_s=0.0)
    state.add(other, now_s=0.0)
    plan = schedule(state.view(), limits)
    state.begin(plan, now_s=0.0)
    assert state.look_ahead(plan, limits) is None


@pytest.mark.parametrize("purpose", Purpose)
def test_prompts_go_on_chunk_by_chunk_beside_those_who_decode(purpose: Purpose) -> None:
    state, limits = new_state(), replace(LIMITS, max_num_batched_tokens=50)
    long = new_request("long", prompt=range(1, 400), purpose=purpose, arrival_s=1.0)
    later = new_request("later", prompt=range(500, 540), arrival_s=2.0)
    plan = begun(state, new_request("decodes"), long, limits=limits)
    state.add(later, now_s=0.0)
    chunks = []
    while (following := state.look_ahead(plan, limits)) is not None:
        state.begin(following, now_s=0.0)
        state.apply(plan, result(plan, [7] * len(plan.rows)), now_s=0.0)
        state.check()
        chunks.append([(row.num_computed_tokens, row.num_new_tokens, row.samples) for row in following.rows])
        plan = following
    assert chunks[:2] == [[(3, 1, True), (47, 49, False)], [(4, 1, True), (96, 49, False)]]
    # The last chunk leaves room for the next prompt, and is told of layer by layer if it is for another worker.
    assert chunks[-1] == [(9, 1, True), (341, 49, False)]


def test_a_prompt_of_which_the_last_step_had_no_token_has_its_turn() -> None:
    state, limits = new_state(), replace(LIMITS, max_num_batched_tokens=50)
    plan = begun(
        state,
        new_request("a", prompt=range(1, 100)),
        new_request("b", prompt=range(101, 120)),
        limits=replace(LIMITS, max_num_batched_tokens=110),
    )
    state.apply(plan, result(plan, [7, 7]), now_s=0.0)
    assert [row.num_new_tokens for row in plan.rows] == [99, 11]
    following = state.look_ahead(begun(state, limits=limits), limits)
    assert following is not None
    assert [(row.num_computed_tokens, row.num_new_tokens, row.samples) for row in following.rows] == [
        (100, 1, True),
        (19, 1, True),
    ]


def test_while_somebody_moves_nothing_is_looked_ahead() -> None:
    state = new_state()
    plan = begun(state, new_request("moves", prompt=range(1, 40)))
    state.apply(plan, result(plan, [1]), now_s=0.0)
    assert state.open_move(plan.rows[0].request.request_id, num_pages=10)
    assert state.look_ahead(begun(state), LIMITS) is None


@pytest.mark.parametrize(("max_num_seqs", "is_full"), [(2, True), (3, False)])
def test_while_somebody_waits_it_is_looked_ahead_only_if_no_seat_is_free(
    max_num_seqs: int, is_full: bool
) -> None:
    limits = replace(LIMITS, max_num_seqs=max_num_seqs)
    state = new_state()
    plan = begun(state, new_request("a"), new_request("b"))
    state.add(new_request("waits"), now_s=0.0)
    assert (state.look_ahead(plan, limits) is not None) == is_full


@pytest.mark.parametrize(("num_pages", "is_full"), [(4, True), (6, False)])
def test_while_somebody_waits_it_is_looked_ahead_only_if_no_page_is_free(
    num_pages: int, is_full: bool
) -> None:
    state = new_state(num_pages=num_pages)
    plan = begun(state, new_request("a", prompt=range(1, 20)))
    state.add(new_request("waits", prompt=range(101, 130)), now_s=0.0)
    assert (state.look_ahead(plan, LIMITS) is not None) == is_full


def test_one_who_waits_gets_the_seat_of_one_that_ends_for_certain_in_the_step_after_its_end() -> None:
    limits = replace(LIMITS, max_num_seqs=2)
    state = new_state()
    plan = begun(state, new_request("last", sampling=SamplingParams(max_tokens=1)), new_request("b"))
    assert state.look_ahead(plan, limits) is not None
    state.add(new_request("waits"), now_s=0.0)
    assert state.look_ahead(plan, limits) is None


def test_what_a_step_gives_for_a_request_that_ended_with_the_one_before_is_dropped() -> None:
    state = new_state()
    plan = begun(state, new_request("ends"), new_request("goes-on"))
    following = state.look_ahead(plan, LIMITS)
    assert following is not None
    state.begin(following, now_s=0.0)
    first = state.apply(plan, result(plan, [EOS, 7]), now_s=0.0)
    assert [output.finish_reason for output in first] == [FinishReason.STOP, None]
    # Its id may be in use again by then.
    state.add(new_request("ends"), now_s=0.0)
    second = state.apply(following, result(following, [8, 9]), now_s=0.0)
    assert [(output.request_id, output.token_ids) for output in second] == [("goes-on", (9,))]
    state.check()
    assert state.num_requests == 2


def test_what_a_step_gives_for_a_request_that_stands_still_since_the_one_before_is_dropped() -> None:
    state = new_state()
    request = new_request()
    plan = begun(state, request)
    following = state.look_ahead(plan, LIMITS)
    assert following is not None
    state.begin(following, now_s=0.0)
    assert state.open_move(request.request_id, num_pages=1)  # while both are under way
    state.apply(plan, result(plan, [7]), now_s=0.0)
    assert state.freeze(request.request_id, now_s=0.0)
    assert state.apply(following, result(following, [8]), now_s=0.0) == ()
    assert (request.output_token_ids, request.num_computed_tokens) == ([7], 3)
    assert state.end_move(request.request_id, now_s=0.0)
    assert [output.token_ids for output in step(state, 8)] == [(8,)]


def test_a_step_that_failed_leaves_its_rows_where_the_one_before_took_them() -> None:
    state = new_state()
    request = new_request()
    plan = begun(state, request)
    following = state.look_ahead(plan, LIMITS)
    assert following is not None
    state.begin(following, now_s=0.0)
    state.apply(plan, result(plan, [7]), now_s=0.0)
    state.step_failed(following)
    state.check()
    assert (request.num_computed_tokens, request.num_scheduled_tokens) == (3, 3)
    assert [output.token_ids for output in step(state, 5)] == [(5,)]
