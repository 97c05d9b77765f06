"""The loop of a worker: decide, let the engine do it, account. Everything else waits for the gap between two steps.

    settle the inbox    submissions, aborts, closed sessions, ended pulls, ended leases, blocks that were loaded
    plan                schedule(state.view(), limits)
    step                as `workers.steps` has it. Pulls and loads into its pages start with it, so that blocks travel
                        while it computes; after it, tokens go to their sessions, finished blocks to their pullers and
                        to the tiers below

The inbox is bounded without a bound of its own: at most `max_num_submitted` submissions, and for each request that is
here at most one abort, one end of a pull, one end of a lease, and a message for each chunk that is loaded for it or
pulled of it.
"""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from workers.engine.engine import Engine
from workers.engine_thread import EngineThread
from workers.errors import (
    EngineFailed,
    InvalidRequest,
    MoveFailed,
    PullCorrupted,
    PullError,
    QueueFull,
    WorkerDraining,
    WorkerError,
)
from workers.exports import Exports, NoSuchExport
from workers.handoff import Puller
from workers.live_moves import LiveMoves
from workers.logs import log_event
from workers.messages import (
    Aborted,
    BlocksPlaced,
    CaughtUp,
    LeaseEnded,
    LoadFailed,
    Message,
    PagesFree,
    PullEnded,
    RingLasts,
    SessionClosed,
    Submitted,
)
from workers.metrics import WorkerMetrics
from workers.outbox import Outbox
from workers.pull_tasks import PullTasks
from workers.request import (
    FinishReason,
    Handoff,
    Purpose,
    Request,
    RequestId,
    RequestOutput,
    SessionId,
    Status,
)
from workers.ring_watch import RingWatch
from workers.scheduler import SchedulerLimits, schedule
from workers.state import EngineState
from workers.step import ScheduledRequest, StepPlan
from workers.steps import Steps
from workers.tier_traffic import TierTraffic

RETRY_AFTER_S = 0.5
# Proving the invariants takes about a microsecond a page: not after every request of a quiet worker.
CHECK_EVERY_S = 5.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopLimits:
    step: SchedulerLimits
    max_num_submitted: int  # during one step
    max_num_moves: int = 1  # at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopParts:
    """What a loop works with; `tiers` is None where no block outlives its pages."""

    state: EngineState
    engine: Engine
    exports: Exports
    puller: Puller
    metrics: WorkerMetrics
    tiers: TierTraffic | None = None


class RequestLoop:
    """All methods are called from the event loop that `run` runs on, and all but `run` and `settled` return at once."""

    def __init__(self, parts: LoopParts, *, limits: LoopLimits) -> None:
        self._state = state = parts.state
        self._engine = parts.engine
        self._exports = exports = parts.exports
        self._metrics = parts.metrics
        self._tiers = parts.tiers
        self._limits = limits
        block_bytes = parts.engine.model.layout.block_bytes
        self._pulls = PullTasks(parts.puller, block_bytes=block_bytes, metrics=parts.metrics, post=self.post)
        self._moves = LiveMoves(state, exports, max_moves=limits.max_num_moves)
        self._rings = RingWatch(state, exports, post=self.post)
        self._num_submitted = 0
        self._is_admitting = True
        self._inbox: deque[Message] = deque()
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._session_ids = map(SessionId, itertools.count(1))
        self._outboxes: dict[SessionId, Outbox] = {}
        self._requests: dict[RequestId, Request] = {}  # all that are here, those in the inbox included
        self._aborted: set[RequestId] = (
            set()
        )  # those of them that are to end, now or when the inbox is settled
        self._doomed: set[RequestId] = set()  # have said their last word, but their pull has not ended
        self._steps = Steps(state, parts.engine, limits.step, listener=self)
        self._last_check_s = 0.0

    # What sessions ask.

    def open_session(self, outbox: Outbox) -> SessionId:
        session_id = next(self._session_ids)
        self._outboxes[session_id] = outbox
        return session_id

    def stop_admitting(self) -> None:
        """From now on every request is refused; those that are here go on."""
        self._is_admitting = False

    @property
    def request_ids(self) -> tuple[RequestId, ...]:
        """All that are here, those that wait for their puller included."""
        return tuple(self._requests)

    def submit(self, request: Request) -> None:
        """Raises `QueueFull`, `InvalidRequest` or `WorkerDraining`; then nothing has happened."""
        if not self._is_admitting:
            if request.purpose is Purpose.PREFILL_ONLY:
                self._exports.close(request.request_id)  # so that its puller learns at once
            raise WorkerDraining("this worker takes no new requests: it stops when those it has are done")
        twin = self._requests.get(request.request_id)
        if twin is not None:
            if twin.session_id == request.session_id and twin.request_id not in self._aborted:
                raise InvalidRequest(
                    f"request id {request.request_id!r} is in use; give every request its own"
                )
            # The same gateway, back after its connection broke, before we have noticed that the old one did.
            raise QueueFull(
                f"request id {request.request_id!r} is still being aborted", retry_after_s=RETRY_AFTER_S
            )
        if self._num_submitted >= self._limits.max_num_submitted:
            raise QueueFull(
                f"{self._num_submitted} requests came during one step, the most this worker takes",
                retry_after_s=RETRY_AFTER_S,
            )
        self._requests[request.request_id] = request
        self._num_submitted += 1
        self.post(Submitted(request, time.time()))

    def abort(self, session_id: SessionId, request_id: RequestId) -> None:
        """Ends a request of this session; one that has ended already does not matter."""
        request = self._requests.get(request_id)
        if request is not None and request.session_id == session_id and request_id not in self._aborted:
            self._aborted.add(request_id)
            self.post(Aborted(request_id))

    def close_session(self, session_id: SessionId) -> None:
        """Aborts all requests of the session; nobody is there to hear of it."""
        if self._outboxes.pop(session_id, None) is None:
            return
        self._aborted.update(self._requests_of(session_id))
        self.post(SessionClosed(session_id))

    # What the hand-over says.

    def lease_ended(self, request_id: RequestId, *, released: bool) -> None:
        """The puller has all it wanted (`released`), or the lease is over."""
        if request_id in self._requests:
            self.post(LeaseEnded(request_id, released))

    def open_move(self, request_id: RequestId, *, num_pages: int) -> None:
        """Another worker, with room for `num_pages` blocks, pulls this request while it goes on here.

        Raises NoSuchExport, QueueFull.
        """
        if request_id in self._aborted:
            raise NoSuchExport(f"request {request_id!r} was aborted")
        self._moves.open(request_id, num_pages=num_pages)
        self._report_progress()

    def caught_up(self, request_id: RequestId) -> None:
        """The puller of a request that moves has all that is ready."""
        if request_id in self._requests:
            self.post(CaughtUp(request_id))

    async def settled(self) -> None:
        """Returns once no request is here, no pull runs, and no block moves to or from device pages."""
        while (
            self._requests or self._pulls or self._inbox or not (self._tiers is None or self._tiers.is_quiet)
        ):
            self._settled.clear()
            await self._settled.wait()

    # The loop.

    async def run(self) -> None:
        """Until cancelled. Raises `EngineFailed` if the engine fails step after step."""
        with EngineThread(self._engine) as engine:
            try:
                while True:
                    self._wake.clear()
                    self._settle_inbox()
                    self._tell_tiers()
                    plan = schedule(self._state.view(), self._limits.step)
                    if plan.is_empty:
                        self._rest()
                        await self._wake.wait()
                    else:
                        await self._steps.run(plan, engine)
            finally:
                self._rings.close()
                await self._pulls.close()
                if self._tiers is not None:
                    await self._tiers.close()

    def _rest(self) -> None:
        self._metrics.set_load(self._state.load())
        self._rings.rested(step_number=self._steps.number)
        if self._tiers is not None:
            self._tiers.rested()
        now_s = time.monotonic()
        if now_s - self._last_check_s >= CHECK_EVERY_S:
            self._last_check_s = now_s
            self._state.check()
        self._settled.set()

    # What steps tell (`workers.steps.Listener`).

    @property
    def waits_for_gap(self) -> bool:
        return bool(self._inbox)

    def step_began(self, plan: StepPlan) -> None:
        if self._tiers is not None:
            preempted = [self._requests[request_id] for request_id in plan.preempted]
            self._tiers.step_began(plan, preempted)
        for pull in plan.pulls:
            self._pulls.start(pull)

    def step_ended(self, plan: StepPlan, outputs: Sequence[RequestOutput], *, step_s: float) -> None:
        if plan.rows or plan.preempted:
            self._metrics.step_done(plan, step_s=step_s)
            if self._tiers is not None:
                self._tiers.step_ended(plan, step_s=step_s)
        for request_id in self._moves.step_ended():
            self._stop_loading(request_id)
        self._report_progress()
        self._deliver(outputs)
        self._metrics.set_load(self._state.load())

    def next_goes_on(self) -> None:
        self._tell_tiers()  # before a step after it takes the pages of what was computed

    def step_failed(self, plan: StepPlan, failure: EngineFailed) -> None:
        self._metrics.step_failed()
        for row in plan.rows:
            if self._requests.get(row.request.request_id) is row.request:  # it may have ended a step before
                self._end(row.request.request_id, failure=failure)

    def layer_computed(self, rows: Sequence[ScheduledRequest], layer: int) -> None:
        for row in rows:
            self._exports.layer_progress(
                row.request.request_id,
                page_ids=row.page_ids,
                num_ready_tokens=row.end_token,
                num_layers=layer + 1,
            )

    def _report_progress(self) -> None:
        for progress in self._state.export_progress():
            self._exports.progress(progress)

    def _stop_loading(self, request_id: RequestId) -> None:
        if self._tiers is not None:
            self._tiers.gone(request_id)

    def _tell_tiers(self) -> None:
        computed = self._state.take_computed_runs()
        if self._tiers is not None:
            self._tiers.moved(computed)

    # The inbox.

    def _settle_inbox(self) -> None:
        while self._inbox:
            match self._inbox.popleft():
                case Submitted(request, unix_s):
                    self._num_submitted -= 1
                    self._add(request, came_s=unix_s)
                case Aborted(request_id):
                    self._end(request_id)
                case SessionClosed(session_id):
                    for request_id in self._requests_of(session_id):
                        self._end(request_id)
                case PullEnded(request_id, handoff):
                    self._end_pull(request_id, handoff)
                case LeaseEnded(request_id, released):
                    self._end_lease(request_id, released=released)
                case CaughtUp(request_id):
                    if self._moves.freeze(request_id):
                        self._stop_loading(request_id)
                        self._report_progress()
                case BlocksPlaced(request_id, region, first_block, is_exact):
                    self._state.loads.place(
                        request_id, region, first_block, is_exact=is_exact, now_s=time.time()
                    )
                case LoadFailed(request_id, region):
                    self._state.loads.fail(request_id, region, region.placed_block, now_s=time.time())
                case RingLasts() as message:
                    self._break_ring(message)
                case PagesFree():
                    pass  # it has woken us

    def _break_ring(self, message: RingLasts) -> None:
        ring = self._rings.lasting(message, step_number=self._steps.number)
        if ring is None:
            return
        for request_id in ring.giving_way:
            log_event(
                _logger,
                "lease_gave_way",
                level=logging.WARNING,
                request=request_id,
                to=ring.waiting.request_id,
            )
            self._end(request_id)
        self._state.put_first(ring.waiting)

    def post(self, message: Message) -> None:
        self._inbox.append(message)
        self._wake.set()

    def _requests_of(self, session_id: SessionId) -> list[RequestId]:
        return [r.request_id for r in self._requests.values() if r.session_id == session_id]

    def _add(self, request: Request, *, came_s: float) -> None:
        exported = request.purpose is Purpose.PREFILL_ONLY
        try:
            self._state.add(request, now_s=came_s)
        except WorkerError as error:
            self._forget(request.request_id)
            if exported:
                self._exports.close(request.request_id)  # so that its puller learns at once
            if (outbox := self._outboxes.get(request.session_id)) is not None:
                outbox.put_refusal(request.request_id, error)
            return
        self._metrics.request_began(num_prompt_tokens=request.num_prompt_tokens)
        if self._tiers is not None:
            self._tiers.queued(request)
        if exported:
            self._exports.open(request.request_id, num_prompt_tokens=request.num_tokens)

    def _end(self, request_id: RequestId, *, failure: WorkerError | None = None) -> None:
        """Aborts a request, or ends it with a failure. One that pulls keeps its pages until the pull has ended."""
        request = self._requests.get(request_id)
        if request is None:
            return
        if request.purpose is Purpose.PREFILL_ONLY:
            self._exports.close(request_id)
        self._moves.gone(request_id)
        output = self._state.abort(request_id, now_s=time.time())
        self._pulls.cancel(request_id)
        if output is None:
            return
        if failure is not None:
            output = replace(output, finish_reason=FinishReason.ERROR, failure=failure)
        self._deliver((output,))

    def _end_lease(self, request_id: RequestId, *, released: bool) -> None:
        request = self._requests.get(request_id)
        if not released and request is not None and request.is_moving:
            was_frozen = self._moves.stay(request_id)
            if was_frozen and self._tiers is not None and request.status is Status.WAITING:
                self._tiers.queued(request)  # it was told that nothing is to be loaded any more
        elif not released:
            self._end(request_id)
        elif (output := self._state.release(request_id, now_s=time.time())) is not None:
            self._deliver((output,))

    # Pulls.

    def _end_pull(self, request_id: RequestId, handoff: Handoff | PullError) -> None:
        self._pulls.ended(request_id)
        now_s = time.time()
        output: RequestOutput | None = None
        if isinstance(handoff, PullError):
            output = self._pull_failed(request_id, handoff, now_s=now_s)
        else:
            source = self._requests[request_id].kv_source
            try:
                output = self._state.pull_succeeded(request_id, handoff, now_s=now_s)
                if source is not None and source.is_live and request_id not in self._doomed:
                    self._pulls.release(source)
            except PullCorrupted as error:
                log_event(
                    _logger, "pull_unusable", level=logging.WARNING, request=request_id, detail=str(error)
                )
                output = self._pull_failed(request_id, error, now_s=now_s)
        if request_id in self._doomed:
            self._forget(request_id)
        if output is not None:
            self._deliver((output,))

    def _pull_failed(self, request_id: RequestId, error: PullError, *, now_s: float) -> RequestOutput | None:
        output = self._state.pull_failed(request_id, now_s=now_s)
        if output is None:
            return None
        return replace(
            output,
            failure=MoveFailed(f"request {request_id!r} could not be pulled, and goes on there: {error}"),
        )

    # What is said.

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        by_session: dict[SessionId, list[RequestOutput]] = {}
        now_s = time.time()
        for output in outputs:
            by_session.setdefault(output.session_id, []).append(output)
            self._metrics.output(output, now_s=now_s)
            if output.finish_reason is not None and output.request_id in self._pulls:
                self._doomed.add(output.request_id)
            elif output.finish_reason is not None:
                self._forget(output.request_id)
        for session_id, session_outputs in by_session.items():
            if (outbox := self._outboxes.get(session_id)) is not None:
                outbox.put(self._steps.number, session_outputs)

    def _forget(self, request_id: RequestId) -> None:
        self._moves.gone(request_id)
        if self._tiers is not None:
            self._tiers.gone(request_id)
        self._engine.forget(request_id)
        del self._requests[request_id]
        self._aborted.discard(request_id)
        self._doomed.discard(request_id)
