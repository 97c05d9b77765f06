import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.blocks import chain_keys, root_key
from workers.errors import InvalidRequest, PullCorrupted, QueueFull
from workers.request import (
    FinishReason,
    Handoff,
    KvSource,
    PageId,
    Purpose,
    Request,
    RequestId,
    RequestOutput,
    SamplingParams,
    SessionId,
    Status,
    TokenLogprobs,
)
from workers.scheduler import SchedulerLimits, schedule
from workers.state import EngineState, StateLimits
from workers.step import SampledToken, StepPlan, StepResult

SOURCE = KvSource(worker_id="p", epoch=1, control_address="unix:/p", request_id="r")
EOS = 0


def new_state(
    *, num_pages: int = 100, max_model_len: int = 1000, vocab_size: int = 10_000, max_num_waiting: int = 100
) -> EngineState:
    return EngineState(
        StateLimits(
            num_pages=num_pages,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            eos_token_ids=frozenset({EOS}),
            model_fingerprint=b"model",
            max_num_waiting=max_num_waiting,
        )
    )


def new_request(
    name: str = "r",
    *,
    prompt: Sequence[int] = (1, 2, 3),
    output: Sequence[int] = (),
    sampling: SamplingParams | None = None,
    purpose: Purpose = Purpose.GENERATE,
    kv_source: KvSource | None = None,
    priority: int = 0,
    arrival_s: float = 0.0,
    session: int = 0,
    cache_salt: str = "",
) -> Request:
    return Request(
        request_id=RequestId(name),
        session_id=SessionId(session),
        prompt_token_ids=list(prompt),
        output_token_ids=list(output),
        sampling=sampling or SamplingParams(max_tokens=100),
        arrival_s=arrival_s,
        priority=priority,
        purpose=purpose,
        kv_source=kv_source,
        cache_salt=cache_salt,
    )


LIMITS = SchedulerLimits(max_num_batched_tokens=64, max_num_seqs=8, max_num_pulls=2)


def step(
    state: EngineState, sampled: SampledToken | int = 1, *, now_s: float = 0.0
) -> tuple[RequestOutput, ...]:
    """One step in which every request that samples gets the same token."""
    token = SampledToken(sampled) if isinstance(sampled, int) else sampled
    plan = schedule(state.view(), LIMITS)
    result = StepResult(sampled={row.request.request_id: token for row in plan.rows if row.samples})
    outputs = state.apply(plan, result, now_s=now_s)
    state.check()
    return outputs


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
    step(state, now_s=12.0)
    step(state, now_s=13.0)
    (output,) = step(state, now_s=14.0)
    assert [(stamp.name, stamp.unix_s) for stamp in output.timeline] == [
        ("received", 10.0),
        ("queued", 11.0),
        ("scheduled", 12.0),
        ("first_chunk", 12.0),
        ("prefill_done", 13.0),
        ("first_token", 13.0),
        ("finished", 14.0),
    ]


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


def test_the_end_of_a_session_aborts_its_requests_and_no_others() -> None:
    state = new_state()
    for number in range(4):
        state.add(new_request(f"r{number}", session=number % 2), now_s=0.0)
    step(state)
    assert state.close_session(SessionId(1), now_s=0.0) == ("r1", "r3")
    assert [output.request_id for output in step(state)] == ["r0", "r2"]


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
    assert progress.handoff == Handoff(num_computed_tokens=100, output_token_ids=(42,))
    assert step(state) == ()
    assert state.load().num_leases == 1
    end = state.release(RequestId("r"), now_s=0.0)
    assert end is not None
    assert (end.finish_reason, end.token_ids, end.first_token_number) == (FinishReason.HANDED_OVER, (), 1)
    assert state.release(RequestId("r"), now_s=0.0) is None
    assert state.export_progress() == ()
    assert state.load().num_free_pages == 100


def test_a_request_that_ends_with_its_first_token_says_so_in_the_hand_over() -> None:
    state = new_state()
    sampling = SamplingParams(max_tokens=9, num_logprobs=0)
    state.add(new_request(purpose=Purpose.PREFILL_ONLY, sampling=sampling), now_s=0.0)
    (output,) = step(state, SampledToken(EOS, TokenLogprobs(-0.5), stop_string="x"))
    assert output.finish_reason is None
    (progress,) = state.export_progress()
    assert progress.handoff == Handoff(
        num_computed_tokens=3,
        output_token_ids=(EOS,),
        logprobs=(TokenLogprobs(-0.5),),
        finish_reason=FinishReason.STOP,
        stop_string="x",
    )


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


@pytest.mark.parametrize(
    ("sampling", "reason", "stop_string", "expected"),
    [
        (SamplingParams(max_tokens=9), FinishReason.STOP, "x", FinishReason.STOP),
        (SamplingParams(max_tokens=9), None, "x", FinishReason.STOP),
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


# Everything at once.

NUM_PAGES, VOCAB_SIZE, MAX_MODEL_LEN = 8, 4, 100
Cell = int | None


class EngineMachine(RuleBasedStateMachine):
    """A tiny worker under random traffic, with an engine that stores, instead of KV, a digest of the whole prefix.

    A wrong page anywhere (shared while written, evicted while used, cached before computed) gives a wrong digest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state = new_state(
            num_pages=NUM_PAGES, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, max_num_waiting=30
        )
        self.memory: list[list[Cell]] = [[None] * 16 for _ in range(NUM_PAGES)]
        self.live: dict[RequestId, Request] = {}
        self.pulling: dict[RequestId, tuple[Request, tuple[PageId, ...], int]] = {}
        self.num_outputs: dict[RequestId, int] = {}
        self.num_added = 0
        self.directory: set[bytes] = set()

    @initialize(batched=st.integers(5, 40), seqs=st.integers(2, 5), pulls=st.integers(1, 2))
    def limit(self, batched: int, seqs: int, pulls: int) -> None:
        self.limits = SchedulerLimits(max_num_batched_tokens=batched, max_num_seqs=seqs, max_num_pulls=pulls)

    @rule(
        shared=st.integers(0, 40),
        own=st.lists(st.integers(1, 3), max_size=10),
        num_outputs=st.sampled_from([0, 0, 0, 3]),
        max_tokens=st.lists(st.integers(4, 90), min_size=1, max_size=4),
        priority=st.integers(-1, 1),
        kind=st.sampled_from(["generate", "generate", "generate", "prefill_only", "pull"]),
        salt=st.sampled_from(["", "", "salt"]),
    )
    def submit(
        self,
        shared: int,
        own: list[int],
        num_outputs: int,
        max_tokens: list[int],
        priority: int,
        kind: str,
        salt: str,
    ) -> None:
        for most in max_tokens:
            self.num_added += 1
            request = new_request(
                f"r{self.num_added}",
                prompt=[1] * shared + own or [2],
                output=[3] * num_outputs,
                sampling=SamplingParams(max_tokens=most),
                purpose=Purpose.PREFILL_ONLY if kind == "prefill_only" else Purpose.GENERATE,
                kv_source=SOURCE if kind == "pull" else None,
                priority=priority,
                arrival_s=float(self.num_added),
                cache_salt=salt,
                session=self.num_added % 9,
            )
            try:
                self.state.add(request, now_s=0.0)
            except QueueFull:
                continue
            self.live[request.request_id] = request
            self.num_outputs[request.request_id] = num_outputs

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        output = self.state.abort(request_id, now_s=0.0)
        assert output is not None
        self.hear([output])

    @rule(session=st.integers(0, 8))
    def close_session(self, session: int) -> None:
        aborted = self.state.close_session(SessionId(session), now_s=0.0)
        expected = {i for i, r in self.live.items() if r.session_id == session}
        assert set(aborted) == expected
        for request_id in aborted:
            del self.live[request_id]

    @rule(
        token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=4, max_size=4),
        num_more=st.integers(0, 20),
    )
    def step(self, token_ids: list[int], num_more: int) -> None:
        self.run_step(token_ids)
        for _ in range(num_more):
            self.run_step([3, 2, 1, 3, 2])

    @rule()
    def fail_step(self) -> None:
        """The engine breaks off somewhere, and the rows end, as the loop has it."""
        plan = schedule(self.state.view(), self.limits)
        plan = replace(plan, pulls=())
        for row in plan.rows:
            for position in range(row.num_computed_tokens, len(row.page_ids) * 16):
                self.memory[row.page_ids[position // 16]][position % 16] = -1
        self.state.step_failed(plan, now_s=0.0)
        for row in plan.rows:
            output = self.state.abort(row.request.request_id, now_s=0.0)
            assert output is not None
            self.hear([output])

    @precondition(lambda self: self.pulling)
    @rule(data=st.data(), succeeds=st.booleans())
    def end_pull(self, data: st.DataObject, succeeds: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.pulling)))
        self.finish_pull(request_id, succeeds=succeeds, token_id=data.draw(st.integers(0, VOCAB_SIZE - 1)))

    @precondition(lambda self: any(r.status is Status.HELD for r in self.live.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = sorted(i for i, r in self.live.items() if r.status is Status.HELD)
        self.let_go(data.draw(st.sampled_from(held)))

    @rule()
    def report_blocks(self) -> None:
        events = self.state.take_block_events()
        self.directory = (self.directory | set(events.stored)) - set(events.removed)
        assert self.directory == set(self.state.take_block_snapshot())

    @invariant()
    def holds(self) -> None:
        self.state.check()

    def teardown(self) -> None:
        """Nothing starves: without new requests, everything ends within a bounded number of steps."""
        if not hasattr(self, "limits"):
            return
        num_tokens = sum(r.num_prompt_tokens + r.sampling.max_tokens for r in self.live.values())
        num_steps_left = (len(self.live) + 1) * num_tokens + len(self.pulling)
        while self.live or self.pulling:
            num_steps_left -= 1
            assert num_steps_left >= 0, "requests do not end"
            if self.run_step([3, 2, 1, 3, 2]).is_empty:
                # Only those wait that wait for others. Let one pull or one lease end, the one begun last.
                held = [i for i, r in self.live.items() if r.status is Status.HELD]
                assert self.pulling or held, "there are requests, but nothing is done about them"
                if held:
                    self.let_go(held[-1])
                else:
                    self.finish_pull(list(self.pulling)[-1], succeeds=num_steps_left % 2 == 0, token_id=1)
            self.state.check()
        assert self.state.num_requests == 0
        assert self.state.load().num_free_pages == NUM_PAGES

    # The engine, the puller and the client.

    def run_step(self, token_ids: list[int]) -> StepPlan:
        plan = schedule(self.state.view(), self.limits)
        num_seqs = len(plan.rows) + len(self.pulling) + len(plan.pulls)
        assert sum(row.num_new_tokens for row in plan.rows) <= self.limits.max_num_batched_tokens
        assert num_seqs <= self.limits.max_num_seqs
        assert len(self.pulling) + len(plan.pulls) <= self.limits.max_num_pulls or not plan.pulls
        assert all(self.live[i].purpose is Purpose.GENERATE for i in plan.preempted)
        # Rows of one plan write to pages of their own.
        written = [page_id for row in plan.rows for page_id in row.page_ids[row.num_computed_tokens // 16 :]]
        written += [page_id for pull in plan.pulls for page_id in pull.page_ids[pull.first_block :]]
        assert len(written) == len(set(written))
        for pull in plan.pulls:
            self.pulling[pull.request.request_id] = (pull.request, pull.page_ids, pull.first_block)
        for row in plan.rows:
            start, stop = row.num_computed_tokens, row.num_computed_tokens + row.num_new_tokens
            self.expect_memory(row.request, row.page_ids, start)
            self.write_memory(row.request, row.page_ids, start, stop)
        sampling = [row.request.request_id for row in plan.rows if row.samples]
        result = StepResult(sampled={i: SampledToken(t) for i, t in zip(sampling, token_ids, strict=False)})
        self.hear(self.state.apply(plan, result, now_s=0.0))
        return plan

    def finish_pull(self, request_id: RequestId, *, succeeds: bool, token_id: int) -> None:
        request, page_ids, first_block = self.pulling.pop(request_id)
        self.expect_memory(request, page_ids, first_block * 16)
        if not succeeds:
            # Half of it came, and garbage after that.
            num_tokens = request.num_tokens
            for position in range(first_block * 16, num_tokens):
                self.memory[page_ids[position // 16]][position % 16] = -1
            self.state.pull_failed(request_id, now_s=0.0)
            return
        self.write_memory(request, page_ids, first_block * 16, request.num_tokens)
        handoff = Handoff(
            num_computed_tokens=request.num_tokens, output_token_ids=(*request.output_token_ids, token_id)
        )
        output = self.state.pull_succeeded(request_id, handoff, now_s=0.0)
        assert (output is None) == (request_id not in self.live)
        if output is not None:
            self.hear([output])

    def let_go(self, request_id: RequestId) -> None:
        request = self.live[request_id]
        self.expect_memory(request, request.page_ids, request.num_computed_tokens)
        output = self.state.release(request_id, now_s=0.0)
        assert output is not None
        assert output.finish_reason is FinishReason.HANDED_OVER
        self.hear([output])

    def hear(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            request = self.live[output.request_id]  # nobody speaks after its end
            assert output.first_token_number == self.num_outputs[output.request_id]
            self.num_outputs[output.request_id] += len(output.token_ids)
            assert self.num_outputs[output.request_id] <= request.sampling.max_tokens
            if output.finish_reason is not None:
                del self.live[output.request_id]

    def expect_memory(self, request: Request, page_ids: Sequence[PageId], num_tokens: int) -> None:
        for position, digest in enumerate(prefix_digests(request, num_tokens)):
            assert self.memory[page_ids[position // 16]][position % 16] == digest

    def write_memory(self, request: Request, page_ids: Sequence[PageId], start: int, stop: int) -> None:
        for position, digest in enumerate(prefix_digests(request, stop)):
            if position >= start:
                self.memory[page_ids[position // 16]][position % 16] = digest


def prefix_digests(request: Request, num_tokens: int) -> list[int]:
    digests, digest = [], hash(request.cache_salt)
    for token_id in request.token_range(0, num_tokens):
        digest = hash((digest, token_id))
        digests.append(digest)
    return digests


EngineMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
test_under_any_traffic_pages_hold_what_they_should_and_every_request_ends = EngineMachine.TestCase
