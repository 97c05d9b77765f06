"""Where what is computed and what is loaded meet."""

from kvstore.blocks import BLOCK_SIZE_TOKENS
from workers import loads
from workers.request import LoadRegion, Request, RequestId, SamplingParams, SessionId, Status
from workers.scheduler import SchedulerLimits, schedule
from workers.state import EngineState, StateLimits
from workers.step import SampledToken, StepPlan, StepResult

LIMITS = SchedulerLimits(max_num_batched_tokens=64, max_num_seqs=8, max_num_pulls=2)
ID = RequestId("r")


def new_state(num_tokens: int = 200) -> tuple[EngineState, Request]:
    limits = StateLimits(
        num_pages=100, max_model_len=1000, vocab_size=100, eos_token_ids=frozenset(),
        model_fingerprint=b"model", max_num_waiting=10,
    )  # fmt: skip
    state = EngineState(limits)
    request = Request(
        request_id=ID, session_id=SessionId(0), prompt_token_ids=list(range(1, 51)) * (num_tokens // 50),
        sampling=SamplingParams(max_tokens=4), arrival_s=0.0,
    )  # fmt: skip
    state.add(request, now_s=0.0)
    return state, request


def claim(state: EngineState, first_block: int, end_block: int) -> LoadRegion:
    region = state.loads.open(ID, first_block=first_block, end_block=end_block, now_s=0.0)
    assert region is not None
    return region


def step(state: EngineState) -> StepPlan:
    plan = schedule(state.view(), LIMITS)
    state.begin(plan, now_s=0.0)
    state.check()
    sampled = {row.request.request_id: SampledToken(1) for row in plan.rows if row.samples}
    state.apply(plan, StepResult(sampled=sampled), now_s=0.0)
    state.check()
    return plan


def rows(plan: StepPlan) -> list[tuple[int, int, bool]]:
    return [(row.num_computed_tokens, row.num_new_tokens, row.samples) for row in plan.rows]


def test_a_request_is_computed_up_to_its_load_and_goes_on_behind_it() -> None:
    state, request = new_state()
    region = claim(state, 5, 12)
    assert rows(step(state)) == [(0, 64, False)]
    assert rows(step(state)) == [(64, 16, False)]
    assert step(state).is_empty
    assert state.loads.stalled() == (request,)
    state.loads.place(ID, region, 5, is_exact=True, now_s=0.0)
    assert rows(step(state)) == [(192, 8, True)]
    assert request.num_cached_tokens == 7 * BLOCK_SIZE_TOKENS


def test_a_request_whose_blocks_all_come_is_admitted_without_a_row() -> None:
    state, _ = new_state()
    region = claim(state, 0, 12)
    plan = step(state)
    assert (len(plan.admissions), plan.rows, plan.is_empty) == (1, (), False)
    state.loads.place(ID, region, 0, is_exact=True, now_s=0.0)
    assert rows(step(state)) == [(192, 8, True)]


def test_the_last_token_is_never_loaded() -> None:
    state, _ = new_state(num_tokens=50)
    assert claim(state, 0, 100).end_block == 3


def test_what_a_step_computes_cannot_be_claimed_while_it_executes() -> None:
    state, _ = new_state()
    plan = schedule(state.view(), LIMITS)
    state.begin(plan, now_s=0.0)
    region = claim(state, 1, 12)
    assert region.first_block == 4
    state.loads.move(ID, region, 0)
    assert region.first_block == 4
    state.apply(plan, StepResult(sampled={}), now_s=0.0)
    state.check()


def test_a_chunk_that_fails_leaves_what_came_after_it() -> None:
    state, request = new_state()
    region = claim(state, 2, 12)
    step(state)
    state.loads.place(ID, region, 8, is_exact=True, now_s=0.0)
    state.loads.fail(ID, region, 8, now_s=0.0)
    computed = [row for _ in range(4) for row in rows(step(state))]
    assert computed == [(32, 64, False), (96, 32, False), (192, 8, True), (200, 1, True)]
    assert request.num_cached_tokens == 4 * BLOCK_SIZE_TOKENS


def test_cached_pages_and_loads_do_not_overlap() -> None:
    state, first = new_state()
    for _ in range(8):
        step(state)
    assert first not in state.view().running
    again = Request(
        request_id=ID, session_id=SessionId(0), prompt_token_ids=list(first.prompt_token_ids),
        sampling=SamplingParams(max_tokens=4), arrival_s=0.0,
    )  # fmt: skip
    state.add(again, now_s=0.0)
    region = claim(state, 3, 12)
    step(state)
    assert again.loads == []
    assert state.loads.pages_to_fill(ID, region, first_block=3, end_block=12) == ()


def test_what_is_computed_on_lossy_blocks_is_neither_told_nor_written() -> None:
    state, request = new_state()
    region = claim(state, 2, 6)
    step(state)
    state.loads.place(ID, region, 4, is_exact=True, now_s=0.0)
    state.loads.place(ID, region, 2, is_exact=False, now_s=0.0)
    for _ in range(5):
        step(state)
    assert request.num_exact_tokens == 2 * BLOCK_SIZE_TOKENS
    assert state.take_block_snapshot() == tuple(request.block_keys[:2])
    assert [computed.run.keys for computed in state.take_computed_runs()] == [tuple(request.block_keys[:2])]


def test_regions_are_in_order_and_a_request_jumps_over_all_that_are_there() -> None:
    state, request = new_state()
    memory, disk = claim(state, 0, 4), claim(state, 2, 9)
    assert (disk.first_block, disk.end_block) == (4, 9)
    assert loads.num_loaded_tokens(request) == 9 * BLOCK_SIZE_TOKENS
    step(state)
    state.loads.place(ID, disk, 4, is_exact=True, now_s=0.0)
    assert request.num_computed_tokens == 0
    state.loads.place(ID, memory, 0, is_exact=True, now_s=0.0)
    assert request.num_computed_tokens == 9 * BLOCK_SIZE_TOKENS
    assert request.status is Status.RUNNING
