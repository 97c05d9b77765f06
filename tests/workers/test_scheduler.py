import copy
from collections.abc import Iterable, Sequence

import pytest

from workers.request import (
    FinishReason,
    Handoff,
    KvSource,
    Purpose,
    Request,
    RequestId,
    RequestOutput,
    SamplingParams,
    SessionId,
)
from workers.scheduler import SchedulerLimits, schedule
from workers.state import EngineState, StateLimits
from workers.step import SampledToken, StepPlan, StepResult

SOURCE = KvSource(worker_id="p", epoch=1, control_address="unix:/p", request_id="r")


def new_state(*, num_pages: int = 100, max_model_len: int = 1000) -> EngineState:
    return EngineState(
        StateLimits(
            num_pages=num_pages,
            max_model_len=max_model_len,
            vocab_size=10_000,
            eos_token_ids=frozenset({0}),
            model_fingerprint=b"model",
            max_num_waiting=100,
        )
    )


def new_limits(
    *, max_num_batched_tokens: int = 64, max_num_seqs: int = 8, max_num_pulls: int = 2
) -> SchedulerLimits:
    return SchedulerLimits(
        max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs, max_num_pulls=max_num_pulls
    )


def add(
    state: EngineState,
    name: str,
    *,
    prompt: int | Sequence[int],
    arrival_s: float = 0.0,
    priority: int = 0,
    purpose: Purpose = Purpose.GENERATE,
    kv_source: KvSource | None = None,
    max_tokens: int = 500,
) -> Request:
    # A number of tokens means a prompt that shares no block with another request's.
    token_ids = [1 + sum(name.encode()) % 9000] * prompt if isinstance(prompt, int) else list(prompt)
    request = Request(
        request_id=RequestId(name),
        session_id=SessionId(0),
        prompt_token_ids=token_ids,
        sampling=SamplingParams(max_tokens=max_tokens),
        arrival_s=arrival_s,
        priority=priority,
        purpose=purpose,
        kv_source=kv_source,
    )
    state.add(request, now_s=arrival_s)
    return request


def step(
    state: EngineState, limits: SchedulerLimits, *, token_id: int = 1
) -> tuple[StepPlan, tuple[RequestOutput, ...]]:
    plan = schedule(state.view(), limits)
    sampled = {row.request.request_id: SampledToken(token_id) for row in plan.rows if row.samples}
    state.begin(plan, now_s=0.0)
    outputs = state.apply(plan, StepResult(sampled=sampled), now_s=0.0)
    state.check()
    return plan, outputs


def rows(plan: StepPlan) -> list[tuple[str, int]]:
    return [(row.request.request_id, row.num_new_tokens) for row in plan.rows]


def names(requests: Iterable[Request]) -> list[str]:
    return [request.request_id for request in requests]


def test_decodes_come_first_then_begun_prompts_then_admissions() -> None:
    state, limits = new_state(), new_limits(max_num_batched_tokens=32)
    add(state, "decodes", prompt=10, arrival_s=2.0)
    step(state, limits)
    add(state, "begun", prompt=50, arrival_s=1.0)
    assert rows(step(state, limits)[0]) == [("decodes", 1), ("begun", 31)]
    add(state, "new", prompt=40, arrival_s=0.0)
    assert rows(step(state, limits)[0]) == [("decodes", 1), ("begun", 19), ("new", 12)]


def test_a_chunk_samples_only_when_it_reaches_the_last_token() -> None:
    state, limits = new_state(), new_limits(max_num_batched_tokens=32)
    add(state, "r", prompt=70)
    plans = [step(state, limits)[0] for _ in range(4)]
    assert [(row.num_computed_tokens, row.num_new_tokens, row.samples) for p in plans for row in p.rows] == [
        (0, 32, False),
        (32, 32, False),
        (64, 6, True),
        (70, 1, True),
    ]


def test_admission_is_by_priority_and_then_by_arrival() -> None:
    state, limits = new_state(), new_limits(max_num_seqs=3)
    add(state, "late", prompt=4, arrival_s=3.0)
    add(state, "early", prompt=4, arrival_s=1.0)
    add(state, "urgent", prompt=4, arrival_s=4.0, priority=-1)
    add(state, "patient", prompt=4, arrival_s=0.0, priority=1)
    assert [row.request.request_id for row in step(state, limits)[0].rows] == ["urgent", "early", "late"]


def test_no_more_requests_run_than_allowed() -> None:
    state, limits = new_state(), new_limits(max_num_seqs=2)
    for number in range(4):
        add(state, f"r{number}", prompt=4, kv_source=SOURCE if number == 1 else None)
    plan, _ = step(state, limits)
    assert len(plan.rows) + len(plan.pulls) == 2
    plan, _ = step(state, limits)
    assert len(plan.rows) == 1
    assert not plan.admissions


def test_nobody_overtakes_a_request_that_lacks_pages() -> None:
    state, limits = new_state(num_pages=6), new_limits()
    add(state, "runs", prompt=40, arrival_s=0.0)  # 3 pages
    step(state, limits)
    add(state, "large", prompt=60, arrival_s=1.0)
    add(state, "small", prompt=4, arrival_s=2.0)
    add(state, "pulled", prompt=4, arrival_s=2.0, kv_source=SOURCE)
    plan, _ = step(state, limits)
    assert rows(plan) == [("runs", 1)]
    assert not plan.pulls
    state.abort(RequestId("runs"), now_s=0.0)
    assert rows(step(state, limits)[0])[0] == ("large", 60)


def test_a_request_that_only_waits_for_its_turn_to_pull_is_overtaken() -> None:
    state, limits = new_state(), new_limits(max_num_pulls=1)
    add(state, "pull-1", prompt=20, arrival_s=0.0, kv_source=SOURCE)
    add(state, "pull-2", prompt=20, arrival_s=1.0, kv_source=SOURCE)
    add(state, "computes", prompt=20, arrival_s=2.0)
    plan, _ = step(state, limits)
    assert names(pull.request for pull in plan.pulls) == ["pull-1"]
    assert rows(plan) == [("computes", 20)]
    assert names(state.view().waiting) == ["pull-2"]


@pytest.mark.parametrize("large_pulls", [False, True])
@pytest.mark.parametrize("small_pull", [False, True])
def test_a_large_request_gets_its_turn_in_an_endless_stream_of_small_ones(
    large_pulls: bool, small_pull: bool
) -> None:
    state, limits = new_state(num_pages=8), new_limits(max_num_seqs=4, max_num_pulls=1)
    pulling: list[Request] = []
    for number in range(100):
        if number == 10:
            add(state, "large", prompt=110, arrival_s=10.0, kv_source=SOURCE if large_pulls else None)
        if (
            number < 10 or len(list(state.view().waiting)) < 5
        ):  # ten are ahead of the large one, and always some behind
            source = SOURCE if small_pull and number % 2 else None
            add(state, f"r{number}", prompt=20, arrival_s=float(number), max_tokens=3, kv_source=source)
        for request in pulling:
            handoff = Handoff(num_computed_tokens=request.num_tokens, output_token_ids=(1,))
            state.pull_succeeded(request.request_id, handoff, now_s=0.0)
        plan, _ = step(state, limits)
        pulling = [pull.request for pull in plan.pulls]
        if any(request.request_id == "large" for request in (*pulling, *state.view().running)):
            return
    pytest.fail("the large request starves")


def test_a_pull_reserves_all_pages_of_the_prompt_and_skips_blocks_that_are_cached() -> None:
    state, limits = new_state(), new_limits()
    prompt = list(range(1, 41))
    add(state, "first", prompt=prompt)
    step(state, limits)
    first_pages = state.view().running[0].page_ids
    add(state, "second", prompt=prompt, kv_source=SOURCE)
    (pull,) = step(state, limits)[0].pulls
    assert (len(pull.page_ids), pull.first_block) == (3, 2)
    assert pull.page_ids[:2] == first_pages[:2]
    assert pull.page_ids[2] not in first_pages


def test_a_fully_cached_prompt_still_computes_its_last_block() -> None:
    state, limits = new_state(), new_limits()
    prompt = list(range(1, 33))
    add(state, "first", prompt=prompt, max_tokens=1)
    step(state, limits)
    add(state, "second", prompt=prompt, max_tokens=1)
    plan, (output,) = step(state, limits)
    assert plan.rows[0].num_computed_tokens == plan.admissions[0].num_cached_tokens == 16
    assert plan.rows[0].num_new_tokens == 16
    assert output.num_cached_tokens == 16


def test_a_plan_does_not_take_the_pages_whose_blocks_it_shares() -> None:
    state, limits = new_state(num_pages=4), new_limits()
    prompt = list(range(1, 50))
    add(state, "first", prompt=prompt[:48], max_tokens=1)  # leaves 3 idle pages
    step(state, limits)
    add(state, "second", prompt=prompt, arrival_s=1.0)
    plan, _ = step(state, limits)
    assert plan.admissions[0].num_cached_tokens == 48
    assert len(set(plan.rows[0].page_ids)) == 4


def test_requests_of_one_plan_share_what_was_cached_before() -> None:
    state, limits = new_state(num_pages=7), new_limits()
    prompt = list(range(1, 49))
    add(state, "first", prompt=prompt, max_tokens=1)
    step(state, limits)
    for number in range(2):
        add(state, f"again-{number}", prompt=[*prompt, number], arrival_s=1.0)
    plan, _ = step(state, limits)
    assert [admission.num_cached_tokens for admission in plan.admissions] == [48, 48]


def test_the_youngest_is_preempted_when_pages_run_out_and_resumes_later() -> None:
    state, limits = new_state(num_pages=4), new_limits()
    for number in range(2):
        add(state, f"r{number}", prompt=15, arrival_s=float(number))
    plan, _ = step(state, limits)
    while not plan.preempted:
        plan, _ = step(state, limits)
    assert plan.preempted == ("r1",)
    assert rows(plan) == [("r0", 1)]
    assert names(state.view().waiting) == ["r1"]
    num_tokens = next(iter(state.view().waiting)).num_tokens
    state.abort(RequestId("r0"), now_s=0.0)
    plan, _ = step(state, limits)
    # It goes on from its own full blocks, which stayed cached, and with the tokens it had.
    assert plan.admissions[0].num_cached_tokens == 16
    assert plan.rows[0].num_computed_tokens + plan.rows[0].num_new_tokens == num_tokens
    assert plan.rows[0].samples


def test_an_urgent_latecomer_is_not_preempted_for_an_older_request() -> None:
    state, limits = new_state(num_pages=4), new_limits()
    add(state, "old", prompt=15, arrival_s=0.0)
    add(state, "urgent", prompt=15, arrival_s=1.0, priority=-1)
    plan, _ = step(state, limits)
    while not plan.preempted:
        plan, _ = step(state, limits)
    assert plan.preempted == ("old",)


def test_a_request_computed_for_another_worker_is_never_preempted() -> None:
    state, limits = new_state(num_pages=12), new_limits(max_num_batched_tokens=4, max_num_seqs=4)
    add(state, "decodes", prompt=4, arrival_s=0.0)
    step(state, limits)
    add(state, "exported", prompt=160, arrival_s=1.0, purpose=Purpose.PREFILL_ONLY)  # 10 pages, over 50 steps
    plan, _ = step(state, limits)
    while len(plan.rows) == 2:
        assert not plan.preempted
        plan, _ = step(state, limits)
    # The decode has filled its two pages and sits out, with nothing lost, while the other goes on.
    assert rows(plan) == [("exported", 4)]
    assert names(state.view().running) == ["decodes", "exported"]
    while not schedule(state.view(), limits).is_empty:
        assert rows(step(state, limits)[0])[0][0] == "exported"
    # What is computed is kept for the other worker. When that lets go, the decode has its page.
    assert state.release(RequestId("exported"), now_s=0.0) is not None
    assert rows(step(state, limits)[0]) == [("decodes", 1)]


def test_a_page_that_others_share_is_not_free_when_one_of_its_users_is_preempted() -> None:
    state, limits = new_state(num_pages=6), new_limits()
    prompt = list(range(1, 17))
    add(state, "warm", prompt=prompt, max_tokens=1)
    step(state, limits)
    for number in range(3):
        add(state, f"r{number}", prompt=[*prompt, number], arrival_s=float(number))
    plan, _ = step(state, limits)
    while not plan.preempted:
        plan, _ = step(state, limits)
    # All have one page in common. The youngest gives up its own one, which is enough for one of the others only.
    assert plan.preempted == ("r2",)
    assert rows(plan) == [("r0", 1)]
    assert names(state.view().running) == ["r0", "r1"]


def test_a_request_whose_pages_are_being_copied_is_not_preempted_for_nothing() -> None:
    state, limits = new_state(num_pages=6), new_limits()
    for number in range(3):
        add(state, f"r{number}", prompt=15, arrival_s=float(number))
    step(state, limits)
    pinned = state.view().running[2].page_ids
    state.pin_pages(pinned)
    while len(state.view().running[2].page_ids) == len(pinned):
        step(state, limits)
    pinned_later = state.view().running[2].page_ids[1:]
    state.pin_pages(pinned_later)  # as an export does that is under way
    plan, _ = step(state, limits)
    while not plan.preempted:
        plan, _ = step(state, limits)
    assert plan.preempted == ("r1",)
    state.unpin_pages(pinned)
    state.unpin_pages(pinned_later)
    state.check()


def test_a_decode_sits_out_while_no_page_of_any_other_comes_free() -> None:
    state, limits = new_state(num_pages=4), new_limits()
    for number in range(2):
        add(state, f"r{number}", prompt=15, arrival_s=float(number))
    while len(state.view().running) < 2 or len(state.view().running[1].page_ids) < 2:
        step(state, limits)
    pinned = state.view().running[1].page_ids
    state.pin_pages(pinned)
    plan, _ = step(state, limits)
    while plan.rows:
        assert not plan.preempted
        plan, _ = step(state, limits)
    state.unpin_pages(pinned)
    plan, _ = step(state, limits)
    assert plan.preempted == ("r1",)
    assert rows(plan) == [("r0", 1)]


def test_an_admission_leaves_a_page_for_every_request_that_may_grow() -> None:
    state, limits = new_state(num_pages=4), new_limits()
    add(state, "runs", prompt=17, arrival_s=0.0)
    step(state, limits)
    add(state, "waits", prompt=32, arrival_s=1.0)  # as many pages as are free
    assert rows(step(state, limits)[0]) == [("runs", 1)]
    state.abort(RequestId("runs"), now_s=0.0)
    assert rows(step(state, limits)[0]) == [("waits", 32)]


def test_requests_admitted_together_leave_a_page_for_each_other() -> None:
    state, limits = new_state(num_pages=4), new_limits()
    for number in range(3):
        add(state, f"r{number}", prompt=16, arrival_s=float(number))
    # The first needs nobody's leave; each further one leaves a page for those before it.
    assert rows(step(state, limits)[0]) == [("r0", 16), ("r1", 16)]


def test_a_request_as_large_as_the_pool_runs_alone_to_its_end() -> None:
    state, limits = new_state(num_pages=4), new_limits()
    add(state, "r", prompt=40)
    outputs = [output for _ in range(24) for output in step(state, limits)[1]]
    assert len(outputs) == 24
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_a_failed_pull_is_computed_in_the_pages_it_had() -> None:
    state, limits = new_state(num_pages=3), new_limits()
    request = add(state, "r", prompt=40, kv_source=SOURCE)
    (pull,) = step(state, limits)[0].pulls
    assert schedule(state.view(), limits).is_empty
    state.pull_failed(request.request_id, now_s=0.0)
    plan, _ = step(state, limits)
    assert rows(plan) == [("r", 40)]
    assert plan.rows[0].page_ids == pull.page_ids


def test_a_pulled_request_decodes_from_the_handed_over_token() -> None:
    state, limits = new_state(), new_limits()
    request = add(state, "r", prompt=40, kv_source=SOURCE)
    step(state, limits)
    handoff = Handoff(num_computed_tokens=40, output_token_ids=(7,))
    state.pull_succeeded(request.request_id, handoff, now_s=0.0)
    plan, _ = step(state, limits)
    assert [(row.num_computed_tokens, row.num_new_tokens, row.samples) for row in plan.rows] == [
        (40, 1, True)
    ]


def test_scheduling_changes_nothing_and_answers_the_same_again() -> None:
    state, limits = new_state(num_pages=6), new_limits()
    for number in range(3):
        add(state, f"r{number}", prompt=20, arrival_s=float(number))
    for _ in range(30):
        before = copy.deepcopy(state)
        plan = schedule(state.view(), limits)
        again = schedule(before.view(), limits)
        assert [(r.request.request_id, r.page_ids) for r in plan.rows] == [
            (r.request.request_id, r.page_ids) for r in again.rows
        ]
        assert plan.preempted == again.preempted
        assert schedule(state.view(), limits) == plan
        step(state, limits)


@pytest.mark.parametrize(
    ("max_num_batched_tokens", "max_num_seqs", "max_num_pulls"), [(7, 8, 1), (8, 0, 1), (8, 8, 0)]
)
def test_limits_under_which_something_could_never_run_are_refused(
    max_num_batched_tokens: int, max_num_seqs: int, max_num_pulls: int
) -> None:
    with pytest.raises(ValueError, match="at least"):
        new_limits(
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_num_pulls=max_num_pulls,
        )
