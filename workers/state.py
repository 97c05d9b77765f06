"""All requests of a worker and the pages they own: the only place where either changes, and only between
steps.

    waiting ──plan──▶ running ──▶ finished           plan = schedule(state.view(), limits)
       │  ▲              │  └───▶ held ─▶ finished   result = engine.execute(plan)
       │  └──preempted───┘  (PREFILL_ONLY)           outputs = state.apply(plan, result, ...)
       └──plan──▶ pulling ──ended──▶ running

Pure: no clock, no I/O. The caller passes the time (seconds since the Unix epoch) and never calls while a step
executes.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from kvstore.blocks import BLOCK_SIZE_TOKENS, BlockKey, chain_keys, child_key, root_key
from workers import timeline
from workers.errors import InvalidRequest, QueueFull
from workers.pages import PagePool, num_pages_for
from workers.request import (
    FinishReason,
    Handoff,
    PageId,
    Purpose,
    Request,
    RequestId,
    RequestOutput,
    Status,
    TokenLogprobs,
)
from workers.scheduler import SchedulerView
from workers.step import SampledToken, ScheduledRequest, StepPlan, StepResult
from workers.validation import check_request, new_tokens

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


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockEvents:
    stored: tuple[BlockKey, ...]
    removed: tuple[BlockKey, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """As WorkerLoad in worker.proto."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_waiting_tokens: int
    num_leases: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportProgress:
    """How far a PREFILL_ONLY request has come: the puller may read blocks below `num_computed_tokens`.

    `handoff` is None until the prompt is computed and the first token sampled.
    """

    request_id: RequestId
    page_ids: tuple[PageId, ...]
    num_computed_tokens: int
    handoff: Handoff | None


class EngineState:
    """See the module. Methods that end a request return its last output."""

    def __init__(self, limits: StateLimits) -> None:
        self._limits = limits
        self._pages = PagePool(limits.num_pages)
        self._requests: dict[RequestId, Request] = {}  # all of them
        self._waiting: list[Request] = []  # by rank
        self._running: list[Request] = []  # by rank
        self._pulling: dict[RequestId, Request] = {}
        self._handoffs: dict[RequestId, Handoff] = {}  # of held requests

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
            running=self._running, waiting=self._waiting, num_pulling=len(self._pulling), pages=self._pages
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
        request.block_keys = list(
            chain_keys(self._root_key(request), request.token_range(0, request.num_tokens))
        )
        request.timeline.stamp(timeline.RECEIVED, request.arrival_s)
        request.timeline.stamp(timeline.QUEUED, now_s)
        self._requests[request.request_id] = request
        insort(self._waiting, request, key=_rank)

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
            return _ended(request, FinishReason.ABORT, now_s=now_s)
        return self._finish(request, FinishReason.ABORT, now_s=now_s)

    def release(self, request_id: RequestId, *, now_s: float) -> RequestOutput | None:
        """The puller of a PREFILL_ONLY request has all it wants; None if the request is not here any more."""
        request = self._requests.get(request_id)
        if request is None or request.purpose is not Purpose.PREFILL_ONLY:
            return None
        return self._finish(request, FinishReason.HANDED_OVER, now_s=now_s)

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
        tokens = new_tokens(request, handoff, vocab_size=self._limits.vocab_size)
        request.timeline.take_over(handoff.timeline)
        request.timeline.stamp(timeline.PULL_DONE, now_s)
        request.num_cached_tokens = max(request.num_cached_tokens, handoff.num_cached_tokens)
        self._run_pulled(request)
        self._cache_computed_blocks(request, handoff.num_computed_tokens)
        return self._append(request, tokens, now_s=now_s, finish_reason=handoff.finish_reason)

    def pull_failed(self, request_id: RequestId, *, now_s: float) -> None:
        """The pull has ended and writes no more: the prompt is computed here, in the reserved pages."""
        request = self._pulling[request_id]
        if request.status is Status.DOOMED:
            self._drop(request)
            return
        request.timeline.stamp(timeline.PULL_FAILED, now_s)
        self._run_pulled(request)

    # A step.

    def apply(
        self, plan: StepPlan, result: StepResult, *, began_s: float, now_s: float
    ) -> tuple[RequestOutput, ...]:
        """Records what a step from `began_s` to `now_s` did. The plan is `schedule(self.view(), ...)` of this state."""
        for request_id in plan.preempted:
            self._preempt(self._requests[request_id], now_s=began_s)
        for admission in plan.admissions:
            self._admit(
                self._requests[admission.request_id], admission.cached_page_ids, Status.RUNNING, now_s=began_s
            )
        for pull in plan.pulls:
            cached = pull.page_ids[: pull.first_block]
            self._admit(pull.request, cached, Status.PULLING, now_s=began_s)
            self._extend_pages(pull.request, pull.page_ids)
        outputs = (self._apply_row(row, result, now_s=now_s) for row in plan.rows)
        return tuple(output for output in outputs if output is not None)

    def step_failed(self, plan: StepPlan, *, now_s: float) -> None:
        """Instead of `apply`, if the step broke off: nobody goes on from what it may have overwritten.

        Its requests are where they were; the caller decides whether they end. Pulls of the plan are not recorded.
        """
        for request_id in plan.preempted:
            self._preempt(self._requests[request_id], now_s=now_s)
        for row in plan.rows:
            self._pages.spoil(row.page_ids[row.num_computed_tokens // BLOCK_SIZE_TOKENS :])

    def export_progress(self) -> tuple[ExportProgress, ...]:
        """Of every PREFILL_ONLY request that owns pages."""
        exported = (r for r in self._requests.values() if r.purpose is Purpose.PREFILL_ONLY and r.page_ids)
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
        return Load(
            num_running=len(self._running) + len(self._pulling),
            num_waiting=len(self._waiting),
            num_pages=self._pages.num_pages,
            num_free_pages=self._pages.num_available,
            num_waiting_tokens=sum(map(_num_prompt_tokens_left, chain(self._waiting, self._running))),
            num_leases=len(self._handoffs),
        )

    def check(self) -> None:
        """Proves the invariants. AssertionError is a bug of ours."""
        by_status: dict[Status, set[RequestId]] = {status: set() for status in Status}
        users: Counter[PageId] = Counter()
        for request in self._requests.values():
            by_status[request.status].add(request.request_id)
            users.update(request.page_ids)
            _prove(request)
        self._pages.check(users)
        assert by_status[Status.WAITING] == {r.request_id for r in self._waiting}
        assert by_status[Status.RUNNING] == {r.request_id for r in self._running}
        assert by_status[Status.PULLING] | by_status[Status.DOOMED] == set(self._pulling)
        assert by_status[Status.HELD] == set(self._handoffs)
        for ranked in (self._waiting, self._running):
            assert ranked == sorted(ranked, key=_rank)

    # Inside.

    def _root_key(self, request: Request) -> BlockKey:
        return root_key(model_fingerprint=self._limits.model_fingerprint, cache_salt=request.cache_salt)

    def _admit(self, request: Request, cached: tuple[PageId, ...], status: Status, *, now_s: float) -> None:
        _remove(self._waiting, request)
        self._pages.share(cached)
        request.page_ids = cached
        request.num_computed_tokens = len(cached) * BLOCK_SIZE_TOKENS
        request.status = status
        if request.timeline.stamp_once(timeline.SCHEDULED, now_s):
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        if status is Status.PULLING:
            request.timeline.stamp(timeline.PULL_STARTED, now_s)
            self._pulling[request.request_id] = request
        else:
            insort(self._running, request, key=_rank)

    def _preempt(self, request: Request, *, now_s: float) -> None:
        _remove(self._running, request)
        self._pages.release(request.page_ids)
        request.page_ids = ()
        request.num_computed_tokens = 0
        request.status = Status.WAITING
        request.timeline.stamp(timeline.PREEMPTED, now_s)
        insort(self._waiting, request, key=_rank)

    def _run_pulled(self, request: Request) -> None:
        del self._pulling[request.request_id]
        request.kv_source = None
        request.status = Status.RUNNING
        insort(self._running, request, key=_rank)

    def _extend_pages(self, request: Request, page_ids: tuple[PageId, ...]) -> None:
        self._pages.take(page_ids[len(request.page_ids) :])
        request.page_ids = page_ids

    def _apply_row(self, row: ScheduledRequest, result: StepResult, *, now_s: float) -> RequestOutput | None:
        request = row.request
        if len(row.page_ids) > len(request.page_ids):
            self._extend_pages(request, row.page_ids)
        self._cache_computed_blocks(request, row.num_computed_tokens + row.num_new_tokens)
        if not request.output_token_ids:
            request.timeline.stamp_once(timeline.FIRST_CHUNK, now_s)
        if not row.samples:
            return None
        return self._append(request, (result.sampled[request.request_id],), now_s=now_s)

    def _cache_computed_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Advances the request; blocks that became full of computed tokens can be shared from now on."""
        keys = request.block_keys
        first_block = request.num_computed_tokens // BLOCK_SIZE_TOKENS
        for block in range(first_block, num_computed_tokens // BLOCK_SIZE_TOKENS):
            if block == len(keys):
                parent = keys[-1] if keys else self._root_key(request)
                start = block * BLOCK_SIZE_TOKENS
                keys.append(child_key(parent, request.token_range(start, start + BLOCK_SIZE_TOKENS)))
            self._pages.cache(request.page_ids[block], keys[block])
        request.num_computed_tokens = num_computed_tokens

    def _append(
        self,
        request: Request,
        tokens: Sequence[SampledToken],
        *,
        now_s: float,
        finish_reason: FinishReason | None = None,
    ) -> RequestOutput | None:
        """New tokens at the end of the output, and perhaps the end of the request. None: the puller tells them."""
        first_token_number = len(request.output_token_ids)
        request.output_token_ids.extend(token.token_id for token in tokens)
        request.timeline.stamp_once(timeline.PREFILL_DONE, now_s)
        is_first = request.timeline.stamp_once(timeline.FIRST_TOKEN, now_s)
        finish_reason = finish_reason or self._finish_reason(request, tokens[-1])
        logprobs = tuple(token.logprobs for token in tokens if token.logprobs is not None)
        if request.purpose is Purpose.PREFILL_ONLY:
            self._hold(request, logprobs, finish_reason, tokens[-1].stop_string)
            if finish_reason is FinishReason.STOP:
                return None  # a token that ends the text is none of it; without the end nobody could know
            finish_reason = None
        elif finish_reason is not None:
            request.timeline.stamp(timeline.FINISHED, now_s)
            self._drop(request)
        return RequestOutput(
            request_id=request.request_id,
            session_id=request.session_id,
            first_token_number=first_token_number,
            token_ids=tuple(token.token_id for token in tokens),
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_string=None if finish_reason is None else tokens[-1].stop_string,
            num_cached_tokens=request.num_cached_tokens,
            timeline=tuple(request.timeline.stamps) if is_first or finish_reason is not None else (),
        )

    def _finish_reason(self, request: Request, last: SampledToken) -> FinishReason | None:
        sampling, num_output_tokens = request.sampling, len(request.output_token_ids)
        if num_output_tokens > sampling.min_tokens and (
            last.stop_string is not None
            or last.token_id in sampling.stop_token_ids
            or (last.token_id in self._limits.eos_token_ids and not sampling.ignore_eos)
        ):
            return FinishReason.STOP
        if num_output_tokens >= sampling.max_tokens or request.num_tokens >= self.max_request_tokens:
            return FinishReason.LENGTH
        return None

    def _hold(
        self,
        request: Request,
        logprobs: tuple[TokenLogprobs, ...],
        finish_reason: FinishReason | None,
        stop_string: str | None,
    ) -> None:
        _remove(self._running, request)
        request.status = Status.HELD
        self._handoffs[request.request_id] = Handoff(
            num_computed_tokens=request.num_computed_tokens,
            output_token_ids=tuple(request.output_token_ids),
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_string=stop_string,
            num_cached_tokens=request.num_cached_tokens,
            timeline=tuple(request.timeline.stamps),
        )

    def _finish(self, request: Request, finish_reason: FinishReason, *, now_s: float) -> RequestOutput:
        self._drop(request)
        return _ended(request, finish_reason, now_s=now_s)

    def _drop(self, request: Request) -> None:
        """Forgets a request in any status. Its full blocks stay cached."""
        match request.status:
            case Status.WAITING:
                _remove(self._waiting, request)
            case Status.RUNNING:
                _remove(self._running, request)
            case Status.PULLING | Status.DOOMED:
                del self._pulling[request.request_id]
            case Status.HELD:
                del self._handoffs[request.request_id]
        del self._requests[request.request_id]
        self._pages.release(request.page_ids)
        request.page_ids = ()


def _rank(request: Request) -> tuple[int, float, str]:
    # The id makes it total, and the same on every worker: a source and its puller serve requests in one
    # order.
    return request.priority, request.arrival_s, request.request_id


def _num_prompt_tokens_left(request: Request) -> int:
    num_left = request.num_tokens - request.num_computed_tokens
    return num_left if num_left > 1 else 0  # one token is a decode


def _remove(ranked: list[Request], request: Request) -> None:
    position = bisect_left(ranked, _rank(request), key=_rank)
    assert ranked[position] is request, f"request {request.request_id!r} is not where its rank says"
    del ranked[position]


def _ended(request: Request, finish_reason: FinishReason, *, now_s: float) -> RequestOutput:
    request.timeline.stamp(timeline.FINISHED, now_s)
    return RequestOutput(
        request_id=request.request_id,
        session_id=request.session_id,
        first_token_number=len(request.output_token_ids),
        finish_reason=finish_reason,
        num_cached_tokens=request.num_cached_tokens,
        timeline=tuple(request.timeline.stamps),
    )


def _prove(request: Request) -> None:
    num_pages, num_computed = len(request.page_ids), request.num_computed_tokens
    assert num_computed <= num_pages * BLOCK_SIZE_TOKENS, "computed tokens have no page"
    assert len(set(request.page_ids)) == num_pages, "a page holds two blocks of one request"
    assert len(request.block_keys) <= request.num_tokens // BLOCK_SIZE_TOKENS
    match request.status:
        case Status.WAITING:
            assert num_pages == 0
            assert num_computed == 0
        case Status.RUNNING:
            assert num_computed < request.num_tokens
            # All known tokens have pages, but for the one that a decode step is about to compute.
            assert num_pages >= num_pages_for(request.num_tokens - 1)
        case Status.PULLING | Status.DOOMED:
            assert num_pages == num_pages_for(request.num_tokens)
        case Status.HELD:
            assert num_computed == request.num_tokens - 1
