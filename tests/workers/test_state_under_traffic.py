"""The state, the scheduler and the pages together, under random traffic on a tiny worker."""

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.errors import QueueFull
from workers.request import (
    FinishReason,
    Handoff,
    KvSource,
    LoadRegion,
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
    Where the KV came through a lossy level, or was computed on top of such, the digest is inverted.
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
        self.exact_digests: set[Cell] = set()  # ever in memory
        self.live: dict[RequestId, Request] = {}
        self.pulling: dict[RequestId, tuple[Request, tuple[PageId, ...], int]] = {}
        self.loading: list[tuple[Request, LoadRegion]] = []
        self.copying: list[tuple[Request, LoadRegion, tuple[PageId, ...], int, bool]] = []
        self.pinned: list[tuple[PageId, ...]] = []
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

    @rule(
        token_ids=st.lists(st.sampled_from([3, 3, 3, 3, 2, 1, 0]), min_size=5, max_size=5),
        most=st.integers(1, 30),
    )
    def step_ahead(self, token_ids: list[int], most: int) -> None:
        """Steps that are launched before the one before them is over, as long as that can be, as the loop has it."""
        plan = self.begin_step()
        for _ in range(most):
            following = self.state.look_ahead(plan, self.limits)
            if following is not None:
                self.begin(following)
            self.end_step(plan, token_ids)
            if following is None:
                return
            plan, token_ids = following, [*token_ids[1:], token_ids[0]]
        self.end_step(plan, token_ids)

    @rule()
    def fail_step(self) -> None:
        """The engine breaks off somewhere, and the rows end, as the loop has it."""
        plan = schedule(self.state.view(), self.limits)
        self.begin(plan)
        for row in plan.rows:
            for position in range(row.num_computed_tokens, len(row.page_ids) * 16):
                self.memory[row.page_ids[position // 16]][position % 16] = -1
        self.state.step_failed(plan)
        for row in plan.rows:
            output = self.state.abort(row.request.request_id, now_s=0.0)
            assert output is not None
            self.hear([output])

    @precondition(lambda self: self.live)
    @rule(data=st.data(), first=st.integers(0, 5), num=st.integers(1, 5))
    def open_load(self, data: st.DataObject, first: int, num: int) -> None:
        request = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        region = self.state.loads.open(
            request.request_id, first_block=first, end_block=first + num, now_s=0.0
        )
        if region is not None:
            self.loading.append((request, region))

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), first=st.integers(0, 6))
    def move_load(self, data: st.DataObject, first: int) -> None:
        request, region = data.draw(st.sampled_from(self.loading))
        self.move(request, region, first)

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), num=st.integers(1, 3), is_exact=st.booleans())
    def begin_copy(self, data: st.DataObject, num: int, is_exact: bool) -> None:
        """A thread begins to copy blocks into pages; the request may be gone before it has ended."""
        request, region = data.draw(st.sampled_from(self.loading))
        if any(other is region for _, other, *_ in self.copying):
            return
        first = max(region.placed_block - num, 0)
        page_ids = self.state.loads.pages_to_fill(
            request.request_id, region, first_block=first, end_block=region.placed_block
        )
        if page_ids:
            self.state.pin_pages(page_ids)
            self.copying.append((request, region, page_ids, region.placed_block - len(page_ids), is_exact))

    @precondition(lambda self: self.copying)
    @rule(data=st.data())
    def end_copy(self, data: st.DataObject) -> None:
        self.finish_copy(data.draw(st.integers(0, len(self.copying) - 1)))

    @precondition(lambda self: self.loading)
    @rule(data=st.data())
    def fail_load(self, data: st.DataObject) -> None:
        request, region = data.draw(st.sampled_from(self.loading))
        if not any(other is region for _, other, *_ in self.copying):
            self.state.loads.fail(request.request_id, region, region.placed_block, now_s=0.0)

    @rule()
    def drop_blocks(self) -> None:
        self.state.drop(None)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.state.unpin_pages(self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1))))

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
        # A step each for what others do, and one for every pin that a step or a pull leaves.
        num_others = 2 * len(self.pulling) + 2 * len(self.loading) + len(self.copying) + len(self.pinned)
        num_steps_left = 2 * (len(self.live) + 1) * num_tokens + num_others
        while self.live or self.pulling:
            num_steps_left -= 1
            assert num_steps_left >= 0, "requests do not end"
            if self.run_step([3, 2, 1, 3, 2]).is_empty:
                # Only those wait that wait for others. Let one copy, load, pull or lease end, the one begun last.
                if self.pinned:
                    self.state.unpin_pages(self.pinned.pop())
                    continue
                if self.copying:
                    self.finish_copy(-1)
                    continue
                if stalled := self.state.loads.stalled():
                    region = stalled[0].loads[0]
                    self.state.loads.fail(stalled[0].request_id, region, region.placed_block, now_s=0.0)
                    continue
                held = [i for i, r in self.live.items() if r.status is Status.HELD]
                assert self.pulling or held, "there are requests, but nothing is done about them"
                if held:
                    self.let_go(held[-1])
                else:
                    self.finish_pull(list(self.pulling)[-1], succeeds=num_steps_left % 2 == 0, token_id=1)
            self.state.check()
        while self.copying:
            self.finish_copy(-1)
        while self.pinned:
            self.state.unpin_pages(self.pinned.pop())
        assert self.state.num_requests == self.state.num_pinned_pages == 0
        assert self.state.load().num_free_pages == NUM_PAGES

    # The engine, the puller and the client.

    def run_step(self, token_ids: list[int]) -> StepPlan:
        plan = self.begin_step()
        # While a step executes, loads may claim blocks, and fail.
        for number, (request, region) in enumerate(self.loading):
            self.move(request, region, (region.first_block + number) % 5)
        self.end_step(plan, token_ids)
        return plan

    def begin_step(self) -> StepPlan:
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
        self.begin(plan)
        return plan

    def end_step(self, plan: StepPlan, token_ids: list[int]) -> None:
        for row in plan.rows:
            start = row.num_computed_tokens
            if row.request.request_id in self.live:
                self.expect_memory(row.request, row.page_ids, start)
                self.write_memory(row.request, row.page_ids, start, row.end_token)
            else:  # it ended a step before, and this one had been launched
                self.memory[row.page_ids[start // 16]][start % 16] = -1
        sampling = [row.request.request_id for row in plan.rows if row.samples]
        result = StepResult(sampled={i: SampledToken(t) for i, t in zip(sampling, token_ids, strict=False)})
        self.hear(self.state.apply(plan, result, now_s=0.0))
        self.take_runs()

    def begin(self, plan: StepPlan) -> None:
        self.state.begin(plan, now_s=0.0)
        self.state.check()
        for pull in plan.pulls:
            self.pulling[pull.request.request_id] = (pull.request, pull.page_ids, pull.first_block)

    def take_runs(self) -> None:
        """What would be written behind is full and exact; some of it is pinned for a while."""
        for computed in self.state.take_computed_runs():
            assert len(computed.run.keys) == len(computed.page_ids)
            cells = [cell for page_id in computed.page_ids for cell in self.memory[page_id]]
            assert all(cell in self.exact_digests for cell in cells)
            if len(self.pinned) < 2 and len(computed.page_ids) == 1:
                self.state.pin_pages(computed.page_ids)
                self.pinned.append(computed.page_ids)

    def move(self, request: Request, region: LoadRegion, first_block: int) -> None:
        """Who loads never gives up what has come and is being copied."""
        copied = [first for _, other, _, first, _ in self.copying if other is region]
        self.state.loads.move(request.request_id, region, min([first_block, *copied]))

    def finish_copy(self, number: int) -> None:
        """The request may have gone, or lost its pages; its pages are nobody else's until now."""
        request, region, page_ids, first_block, is_exact = self.copying.pop(number)
        assert not {p for r in self.live.values() if r is not request for p in r.page_ids} & set(page_ids)
        digests = prefix_digests(request, (first_block + len(page_ids)) * 16)[first_block * 16 :]
        for position, digest in enumerate(digests):
            self.memory[page_ids[position // 16]][position % 16] = digest if is_exact else ~digest
        if is_exact:
            self.exact_digests.update(digests)
        self.state.loads.place(request.request_id, region, first_block, is_exact=is_exact, now_s=0.0)
        self.state.unpin_pages(page_ids)
        self.state.check()

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
        for position, digest in enumerate(prefix_digests(request, request.num_tokens)):
            if position >= first_block * 16:
                self.memory[page_ids[position // 16]][position % 16] = digest
                self.exact_digests.add(digest)
        handoff = Handoff(
            num_computed_tokens=request.num_tokens, output_token_ids=(*request.output_token_ids, token_id)
        )
        output = self.state.pull_succeeded(request_id, handoff, now_s=0.0)
        self.take_runs()
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
            allowed = {digest} if request.is_exact_to(position + 1) else {digest, ~digest}
            assert self.memory[page_ids[position // 16]][position % 16] in allowed

    def write_memory(self, request: Request, page_ids: Sequence[PageId], start: int, stop: int) -> None:
        is_exact = True
        for position, digest in enumerate(prefix_digests(request, stop)):
            page = self.memory[page_ids[position // 16]]
            if position < start:
                is_exact = is_exact and page[position % 16] == digest
                continue
            page[position % 16] = digest if is_exact else ~digest
            if is_exact:
                self.exact_digests.add(digest)


def prefix_digests(request: Request, num_tokens: int) -> list[int]:
    digests, digest = [], hash(request.cache_salt)
    for token_id in request.token_range(0, num_tokens):
        digest = hash((digest, token_id))
        digests.append(digest)
    return digests


EngineMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
test_under_any_traffic_pages_hold_what_they_should_and_every_request_ends = EngineMachine.TestCase
