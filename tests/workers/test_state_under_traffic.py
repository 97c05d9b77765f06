"""The state, the scheduler and the pages together, under random traffic on a tiny worker."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.errors import QueueFull
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
)
from workers.scheduler import SchedulerLimits, schedule
from workers.state import EngineState, StateLimits
from workers.step import SampledToken, StepPlan, StepResult

SOURCE = KvSource(worker_id="p", epoch=1, control_address="unix:/p", request_id="r")
NUM_PAGES, VOCAB_SIZE, MAX_MODEL_LEN = 8, 4, 100
Cell = int | None


class EngineMachine(RuleBasedStateMachine):
    """A tiny worker under random traffic, with an engine that stores, instead of KV, a digest of the whole prefix.

    A wrong page anywhere (shared while written, evicted while used, cached before computed) gives a wrong digest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state = EngineState(
            StateLimits(
                num_pages=NUM_PAGES,
                max_model_len=MAX_MODEL_LEN,
                vocab_size=VOCAB_SIZE,
                eos_token_ids=frozenset({0}),
                model_fingerprint=b"model",
                max_num_waiting=30,
            )
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
            request = Request(
                request_id=RequestId(f"r{self.num_added}"),
                session_id=SessionId(1),
                prompt_token_ids=[1] * shared + own or [2],
                output_token_ids=[3] * num_outputs,
                sampling=SamplingParams(max_tokens=most),
                purpose=Purpose.PREFILL_ONLY if kind == "prefill_only" else Purpose.GENERATE,
                kv_source=SOURCE if kind == "pull" else None,
                priority=priority,
                arrival_s=float(self.num_added),
                cache_salt=salt,
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
        self.hear(self.state.apply(plan, result, began_s=0.0, now_s=0.0))
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
            num_untold = output.first_token_number - self.num_outputs[output.request_id]
            # A prefill leaves a first token that ends the text to its puller.
            may_be_untold = request.purpose is Purpose.PREFILL_ONLY and not output.token_ids
            assert num_untold == 0 or (num_untold == 1 and may_be_untold)
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
