"""All requests of a worker and the pages they own: the only place where either changes.

    waiting ──plan──▶ running ──▶ finished           plan = schedule(state.view(), limits)
       │  ▲              │  └───▶ held ─▶ finished   state.begin(plan, ...)
       │  └──preempted───┘  (PREFILL_ONLY)           result = engine.execute(plan)
       └──plan──▶ pulling ──ended──▶ running         outputs = state.apply(plan, result, ...)

A request that moves to another worker is frozen at the end, from waiting or running, then finished or resumed.

`begin` gives all pages of the plan to its requests, so that the books are right while the step executes. Meanwhile
pages may be pinned and loads be claimed; requests come, go and jump over what was loaded between steps only.

Pure: no clock, no I/O. The caller passes the time (seconds since the Unix epoch).
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from kvstore.blocks import BLOCK_SIZE_TOKENS, BlockKey, chain_keys, root_key
from workers import loads, moves, timeline
from workers.computed_blocks import ComputedBlocks, ComputedRun
from workers.errors import InvalidRequest, QueueFull
from workers.invariants import prove_request
from workers.load_book import LoadBook
from workers.look_ahead import look_ahead
from workers.outputs import end_output, finish_reason, logprobs_of, new_tokens_output
from workers.pages import PagePool
from workers.policies import Policy, own_rank, priority, rank
from workers.reports import BlockEvents, ExportProgress, Load
from workers.request import (
    FinishReason,
    Handoff,
    PageId,
    Purpose,
    Request,
    RequestId,
    RequestOutput,
    Status,
)
from workers.rings import IsPulled, Ring, find_ring
from workers.scheduler import SchedulerLimits, SchedulerView
from workers.step import SampledToken, ScheduledRequest, StepPlan, StepResult
from workers.tenants import Tenants
from workers.validation import check_prefilled, check_request, handed_over_tokens
from workers.waiting import WaitingQueue

# How long a rejected client should wait: a few decode steps of a full batch on a slow machine, or one long
# prompt.
RETRY_AFTER_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StateLimits:
    """Facts of the model and of the memory, and the bound of the queue."""

    num_pages: int
    max_model_len: int  # tokens of a request, prompt and output together
    vocab_size: int
    eos_token_ids: frozenset[int]
    model_fingerprint: bytes
    max_num_waiting: int


class EngineState:
    """See the module. Methods that end a request return its last output."""

    def __init__(self, limits: StateLimits, *, policy: Policy = priority) -> None:
        self._limits = limits
        self._pages = PagePool(limits.num_pages)
        self._requests: dict[RequestId, Request] = {}  # all of them
        self._policy = policy
        self._own_rank = partial(own_rank, policy)
        self._tenants = Tenants()
        self._waiting = WaitingQueue(policy, self._tenants)
        self._running: list[Request] = []  # as if of one tenant
        self._pulling: dict[RequestId, Request] = {}
        self._handoffs: dict[RequestId, Handoff] = {}  # of held and frozen requests
        self._moving: dict[RequestId, Request] = {}  # to another worker, frozen ones included
        self._computed = ComputedBlocks(self._pages)
        self.loads = LoadBook(self._requests, self._running, self._waiting, self._computed)

    @property
    def max_request_tokens(self) -> int:
        """The longest request that can run here, prompt and output: model and memory bound it."""
        return min(self._limits.max_model_len, self._limits.num_pages * BLOCK_SIZE_TOKENS)

    @property
    def num_requests(self) -> int:
        """Requests in any status."""
        return len(self._requests)

    def view(self) -> SchedulerView:
        return SchedulerView(
            running=self._running_in_turn(),
            waiting=self._waiting,
            num_pulling=len(self._pulling),
            pages=self._pages,
        )

    # Requests come and go.

    def add(self, request: Request, *, now_s: float) -> None:
        """Queues a request. Raises `InvalidRequest` or `QueueFull`; then the state is as before."""
        if request.request_id in self._requests:
            raise InvalidRequest(f"request id {request.request_id!r} is in use; give every request its own")
        check_request(request, vocab_size=self._limits.vocab_size, max_tokens=self.max_request_tokens)
        if len(self._waiting) >= self._limits.max_num_waiting:
            message = f"{len(self._waiting)} requests are waiting, the most this worker takes"
            raise QueueFull(message, retry_after_s=RETRY_AFTER_S)
        request.root = root_key(
            model_fingerprint=self._limits.model_fingerprint, cache_salt=request.cache_salt
        )
        request.block_keys = list(chain_keys(request.root, request.token_range(0, request.num_tokens)))
        request.timeline.stamp(timeline.RECEIVED, request.arrival_s)
        request.timeline.stamp(timeline.QUEUED, now_s)
        self._requests[request.request_id] = request
        self._tenants.enter(request)
        self._waiting.add(request)

    def abort(self, request_id: RequestId, *, now_s: float) -> RequestOutput | None:
        """Ends a request, whatever it is doing; None if it is not here (any more).

        While it is pulling its pages stay reserved: the caller stops the pull and then reports `pull_failed`.
        For a PREFILL_ONLY request the caller closes the export first: its pages are free from now on.
        """
        request = self._requests.get(request_id)
        if request is None or request.status is Status.DOOMED:
            return None
        if request.status is Status.PULLING:
            request.status = Status.DOOMED
            return end_output(request, FinishReason.ABORT, now_s=now_s)
        return self._finish(request, FinishReason.ABORT, now_s=now_s)

    def release(self, request_id: RequestId, *, now_s: float) -> RequestOutput | None:
        """The puller of a PREFILL_ONLY or frozen request has all it wants; None if there is none here (any more)."""
        request = self._requests.get(request_id)
        if request is None or (
            request.purpose is not Purpose.PREFILL_ONLY and request.status is not Status.FROZEN
        ):
            return None
        return self._finish(request, FinishReason.HANDED_OVER, now_s=now_s)

    @property
    def waits_beside_leases(self) -> bool:
        """Somebody waits, and something is held for others."""
        return len(self._waiting) > 0 and len(self._handoffs) > 0

    def ring(self, is_pulled: IsPulled) -> Ring | None:
        """If nothing can be done: who waits for whom, see workers.rings.

        None while KV comes from anywhere: nothing is computed then either, and yet it goes on.
        """
        if self._pulling or any(request.loads for request in self._running):
            return None
        held = (r for i in self._handoffs if (r := self._requests[i]).status is Status.HELD)
        return find_ring(self._waiting, held, pages=self._pages, is_pulled=is_pulled)

    def put_first(self, request: Request) -> None:
        """One that waits is admitted before all others."""
        self._waiting.put_first(request)

    def pull_succeeded(
        self, request_id: RequestId, handoff: Handoff, *, now_s: float
    ) -> RequestOutput | None:
        """The KV of `handoff.num_computed_tokens` tokens is in the request's pages: it runs from there.

        Returns the tokens of the source that are new here; None if the request was aborted meanwhile.
        Raises `PullCorrupted`, and changes nothing, if the hand-over does not fit the request: report
        `pull_failed` then.
        """
        request = self._pulling[request_id]
        if request.status is Status.DOOMED:
            self._drop(request)
            return None
        if request.kv_source is not None and request.kv_source.is_live:
            return self._moved_here(request, handoff, now_s=now_s)
        tokens = handed_over_tokens(request, handoff, vocab_size=self._limits.vocab_size)
        check_prefilled(request, handoff, tokens, eos_token_ids=self._limits.eos_token_ids)
        request.timeline.take_over(handoff.timeline)
        request.timeline.stamp(timeline.PULL_DONE, now_s)
        request.num_cached_tokens = max(request.num_cached_tokens, handoff.num_cached_tokens)
        if handoff.num_exact_tokens is not None:
            request.lose_exactness(handoff.num_exact_tokens)
        self._run_pulled(request)
        self._computed.advance(request, handoff.num_computed_tokens)
        return self._append(request, tokens, now_s=now_s)

    def pull_failed(self, request_id: RequestId, *, now_s: float) -> RequestOutput | None:
        """The pull has ended and writes no more: the prompt is computed here, in the reserved pages.

        A request that runs elsewhere ends here instead, and goes on there.
        """
        request = self._pulling[request_id]
        if request.status is Status.DOOMED:
            self._drop(request)
            return None
        request.timeline.stamp(timeline.PULL_FAILED, now_s)
        if request.kv_source is not None and request.kv_source.is_live:
            return self._finish(request, FinishReason.ERROR, now_s=now_s)
        self._run_pulled(request)
        return None

    # Moves to other workers, see workers.moves. `open_move` is safe while a step executes.

    def open_move(self, request_id: RequestId, *, num_pages: int) -> bool:
        """Whether another worker, with room for `num_pages` blocks, may pull this request while it goes on here."""
        request = self._requests.get(request_id)
        if request is None or not moves.can_move(request, num_pages=num_pages):
            return False
        request.is_moving = True
        self._moving[request_id] = request
        return True

    def num_tokens(self, request_id: RequestId) -> int:
        return self._requests[request_id].num_tokens

    def moving(self) -> tuple[Request, ...]:
        return tuple(self._moving.values())

    def freeze(self, request_id: RequestId, *, now_s: float) -> bool:
        """The request stands still: `export_progress` has all of it. False if it cannot now, or is frozen."""
        request = self._moving.get(request_id)
        if request is None or request.status not in (Status.WAITING, Status.RUNNING):
            return False
        if request.status is Status.RUNNING and request.loads:
            return False  # a thread may be writing to its pages, and it may have to go on in them at once
        if request.status is Status.WAITING:
            self._waiting.remove(request)
        else:
            self._remove_running(request)
        request.loads.clear()
        request.status = Status.FROZEN
        request.timeline.stamp(timeline.FROZEN, now_s)
        self._handoffs[request_id] = moves.handoff_of(request)
        return True

    def end_move(self, request_id: RequestId, *, now_s: float) -> bool:
        """The request stays here. Whether it was frozen, and goes on."""
        request = self._moving.pop(request_id, None)
        if request is None:
            return False
        request.is_moving = False
        if request.status is not Status.FROZEN:
            return False
        del self._handoffs[request_id]
        request.timeline.stamp(timeline.RESUMED, now_s)
        if request.page_ids:
            self._run(request)
        else:
            request.status = Status.WAITING
            self._waiting.add(request)
        return True

    # A step.

    def begin(self, plan: StepPlan, *, now_s: float) -> None:
        """The step begins. The plan is `schedule(self.view(), ...)` of this state; its pages are its requests' now."""
        for request_id in plan.preempted:
            self._preempt(self._requests[request_id], now_s=now_s)
        for admission in plan.admissions:
            request = self._requests[admission.request_id]
            self._admit(request, admission.page_ids, admission.first_block, now_s=now_s)
            self._run(request)
        for pull in plan.pulls:
            self._admit(pull.request, pull.page_ids, pull.first_block, now_s=now_s)
            pull.request.timeline.stamp(timeline.PULL_STARTED, now_s)
            pull.request.status = Status.PULLING
            self._pulling[pull.request.request_id] = pull.request
        for row in plan.rows:
            self._pages.take(row.page_ids[len(row.request.page_ids) :])
            row.request.page_ids = row.page_ids
            row.request.num_scheduled_tokens = row.end_token

    def look_ahead(self, plan: StepPlan, limits: SchedulerLimits) -> StepPlan | None:
        """The step after `plan`, which has begun, if it can be known before the result of `plan` is."""
        return look_ahead(plan, self.view(), limits, max_request_tokens=self.max_request_tokens)

    def apply(self, plan: StepPlan, result: StepResult, *, now_s: float) -> tuple[RequestOutput, ...]:
        """Records what the rows of a step that began have computed by `now_s`. Rows of a step that was looked ahead to
        are dropped if their requests have ended with the one before, or stand still for their puller since."""
        rows = (row for row in plan.rows if self._still_runs(row.request))
        outputs = (self._apply_row(row, result, now_s=now_s) for row in rows)
        return tuple(output for output in outputs if output is not None)

    def _still_runs(self, request: Request) -> bool:
        return self._requests.get(request.request_id) is request and request.status is Status.RUNNING

    def step_failed(self, plan: StepPlan) -> None:
        """Instead of `apply`, if the step broke off: its rows are where they were. Whether they end is the caller's."""
        for row in plan.rows:
            row.request.num_scheduled_tokens = row.request.num_computed_tokens

    # Pages that others copy; safe while a step executes.

    def pin_pages(self, page_ids: Sequence[PageId]) -> None:
        self._pages.pin(page_ids)

    def unpin_pages(self, page_ids: Sequence[PageId]) -> None:
        self._pages.unpin(page_ids)

    @property
    def num_pinned_pages(self) -> int:
        return self._pages.num_pinned

    @property
    def num_cached_pages(self) -> int:
        return self._pages.num_cached

    def num_cached_blocks(self, keys: Sequence[BlockKey]) -> int:
        """Of these blocks, from the first on, so many are in pages."""
        return len(self._pages.longest_cached_prefix(keys, len(keys)))

    def exact_pages(self, keys: Sequence[BlockKey]) -> tuple[PageId, ...]:
        """Those that hold these blocks exactly, from the first on, whoever uses them."""
        page_ids = self._pages.longest_cached_prefix(keys, len(keys))
        return tuple(page_ids[: self._pages.num_exact(page_ids)])

    def drop(self, root: BlockKey | None) -> int:
        """Forgets cached blocks that nobody uses, of one root or all, and says how many."""
        return self._pages.drop(root)

    def take_computed_runs(self) -> tuple[ComputedRun, ...]:
        """Those since the last call; their pages hold them until the next step begins."""
        return self._computed.take_runs()

    def export_progress(self) -> tuple[ExportProgress, ...]:
        """Of every PREFILL_ONLY request that owns pages, and of those that move."""
        exported = (
            r
            for r in self._requests.values()
            if r.is_moving or (r.purpose is Purpose.PREFILL_ONLY and r.page_ids)
        )
        return tuple(
            ExportProgress(
                request_id=request.request_id,
                page_ids=request.page_ids,
                num_computed_tokens=request.num_computed_tokens,
                handoff=self._handoffs.get(request.request_id),
            )
            for request in exported
        )

    # What others want to know.

    def take_block_events(self) -> BlockEvents:
        """What changed in the set of cached blocks since the last call."""
        stored, removed = self._pages.take_changes()
        return BlockEvents(stored=stored, removed=removed)

    def take_block_snapshot(self) -> tuple[BlockKey, ...]:
        """All cached blocks; the next events are relative to it."""
        self._pages.take_changes()
        return self._pages.cached_keys()

    def load(self) -> Load:
        """Of those that wait only totals are looked at: told after each step, a thousand took 0.5 ms of it."""
        num_running_tokens = sum(map(loads.num_prompt_tokens_left, self._running))
        return Load(
            num_running=len(self._running) + len(self._pulling),
            num_waiting=len(self._waiting),
            num_pages=self._pages.num_pages,
            num_free_pages=self._pages.num_available,
            num_waiting_tokens=self._waiting.num_prompt_tokens_left + num_running_tokens,
            num_leases=len(self._handoffs),
            num_demanded_pages=self._waiting.num_pages,
        )

    def check(self) -> None:
        """Proves the invariants. AssertionError is a bug of ours."""
        by_status: dict[Status, set[RequestId]] = {status: set() for status in Status}
        users: Counter[PageId] = Counter()
        for request in self._requests.values():
            by_status[request.status].add(request.request_id)
            users.update(request.page_ids)
            prove_request(request)
        self._pages.check(users)
        assert by_status[Status.WAITING] == {r.request_id for r in self._waiting.requests()}
        assert by_status[Status.RUNNING] == {r.request_id for r in self._running}
        assert by_status[Status.PULLING] | by_status[Status.DOOMED] == set(self._pulling)
        assert by_status[Status.HELD] | by_status[Status.FROZEN] == set(self._handoffs)
        assert by_status[Status.FROZEN] <= set(self._moving)
        assert {r.request_id for r in self._requests.values() if r.is_moving} == set(self._moving)
        self._waiting.check()
        self._tenants.check(Counter(request.tenant for request in self._requests.values()))
        assert self._running == sorted(self._running, key=self._own_rank)

    # Inside.

    def _running_in_turn(self) -> list[Request]:
        if self._tenants.num_present < 2:
            return self._running
        served = self._tenants.served
        return sorted(self._running, key=lambda r: rank(self._policy, r, served(r.tenant)))

    def _remove_running(self, request: Request) -> None:
        position = bisect_left(self._running, self._own_rank(request), key=self._own_rank)
        assert self._running[position] is request, (
            f"request {request.request_id!r} is not where its rank says"
        )
        del self._running[position]

    def _admit(
        self, request: Request, page_ids: tuple[PageId, ...], num_cached: int, *, now_s: float
    ) -> None:
        self._waiting.remove(request)
        cached = page_ids[:num_cached]
        self._pages.share(cached)
        self._pages.take(page_ids[num_cached:])
        request.page_ids = page_ids
        request.num_computed_tokens = request.num_scheduled_tokens = num_cached * BLOCK_SIZE_TOKENS
        num_exact = self._pages.num_exact(cached)
        if num_exact < num_cached:
            request.lose_exactness(num_exact * BLOCK_SIZE_TOKENS)
        loads.begin_after(request, num_cached)
        if request.timeline.stamp_once(timeline.SCHEDULED, now_s):
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)

    def _preempt(self, request: Request, *, now_s: float) -> None:
        self._remove_running(request)
        self._pages.release(request.page_ids)
        request.page_ids = ()
        request.num_computed_tokens = request.num_scheduled_tokens = 0
        request.num_exact_tokens = None
        request.loads.clear()
        request.status = Status.WAITING
        request.timeline.stamp(timeline.PREEMPTED, now_s)
        self._waiting.add(request)

    def _moved_here(self, request: Request, handoff: Handoff, *, now_s: float) -> RequestOutput | None:
        """As `pull_succeeded`, for a request that ran elsewhere until now."""
        tokens = moves.moved_tokens(request, handoff, vocab_size=self._limits.vocab_size)
        request.timeline.go_on(handoff.timeline)
        request.timeline.stamp(timeline.MOVED, now_s)
        request.num_cached_tokens = handoff.num_cached_tokens
        if handoff.num_exact_tokens is not None:
            request.lose_exactness(handoff.num_exact_tokens)
        self._run_pulled(request)
        request.output_token_ids.extend(token.token_id for token in tokens)
        moves.keep_logprobs(request, logprobs_of(tokens))
        self._computed.advance(request, max(handoff.num_computed_tokens, request.num_computed_tokens))
        return new_tokens_output(request, tokens, is_first=True, reason=None) if tokens else None

    def _run_pulled(self, request: Request) -> None:
        del self._pulling[request.request_id]
        request.kv_source = None
        self._run(request)

    def _run(self, request: Request) -> None:
        request.status = Status.RUNNING
        insort(self._running, request, key=self._own_rank)

    def _apply_row(self, row: ScheduledRequest, result: StepResult, *, now_s: float) -> RequestOutput | None:
        request = row.request
        end_token = row.end_token
        self._tenants.charge(
            request, first_token=row.num_computed_tokens, end_token=end_token, num_sampled=int(row.samples)
        )
        self._computed.advance(request, end_token)
        if not request.output_token_ids:
            request.timeline.stamp_once(timeline.FIRST_CHUNK, now_s)
        if row.samples:
            return self._append(request, (result.sampled[request.request_id],), now_s=now_s)
        self.loads.jump(request, now_s=now_s)
        return None

    def _append(
        self, request: Request, tokens: Sequence[SampledToken], *, now_s: float
    ) -> RequestOutput | None:
        """New tokens at the end of the output, and perhaps the end of the request. None: the puller tells them."""
        request.output_token_ids.extend(token.token_id for token in tokens)
        moves.keep_logprobs(request, logprobs_of(tokens))
        request.timeline.stamp_once(timeline.PREFILL_DONE, now_s)
        is_first = request.timeline.stamp_once(timeline.FIRST_TOKEN, now_s)
        reason = finish_reason(
            request,
            tokens[-1],
            eos_token_ids=self._limits.eos_token_ids,
            max_tokens=self.max_request_tokens,
        )
        if request.purpose is Purpose.PREFILL_ONLY:
            self._hold(request, tokens, reason)
            if reason is FinishReason.STOP:
                return None  # a token that ends the text is none of it; without the end nobody could know
            reason = None
        elif reason is not None:
            request.timeline.stamp(timeline.FINISHED, now_s)
            self._drop(request)
        return new_tokens_output(request, tokens, is_first=is_first, reason=reason)

    def _hold(self, request: Request, tokens: Sequence[SampledToken], reason: FinishReason | None) -> None:
        self._remove_running(request)
        request.status = Status.HELD
        self._handoffs[request.request_id] = Handoff(
            num_computed_tokens=request.num_computed_tokens,
            output_token_ids=tuple(request.output_token_ids),
            logprobs=logprobs_of(tokens),
            finish_reason=reason,
            stop_string=tokens[-1].stop_string,
            num_cached_tokens=request.num_cached_tokens,
            num_exact_tokens=request.num_exact_tokens,
            timeline=tuple(request.timeline.stamps),
        )

    def _finish(self, request: Request, reason: FinishReason, *, now_s: float) -> RequestOutput:
        self._drop(request)
        return end_output(request, reason, now_s=now_s)

    def _drop(self, request: Request) -> None:
        """Forgets a request in any status. Its full blocks stay cached."""
        match request.status:
            case Status.WAITING:
                self._waiting.remove(request)
            case Status.RUNNING:
                self._remove_running(request)
            case Status.PULLING | Status.DOOMED:
                del self._pulling[request.request_id]
            case Status.HELD | Status.FROZEN:
                del self._handoffs[request.request_id]
        del self._requests[request.request_id]
        self._moving.pop(request.request_id, None)
        request.is_moving = False
        self._tenants.leave(request)
        self._pages.release(request.page_ids)
        request.page_ids = ()
        request.loads.clear()
