"""Which requests run on the workers, and moving them: checks, waits and accounts; `attempt` does it."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection
from dataclasses import asdict, dataclass

from control_plane.directory.member import Incarnation, Role, WorkerId
from control_plane.errors import CannotMove, RequestNotFound, WorkerNotFound
from control_plane.gateway.logs import log_event
from control_plane.gateway.metrics import GatewayMetrics
from control_plane.gateway.move import Move, MoveOutcome, given_up, timed_out
from control_plane.gateway.progress import Progress
from control_plane.gateway.sessions import SessionClosed, SessionPool, WorkerSession
from control_plane.migration import MoveReason, num_pages_of

MAX_REMEMBERED_MOVES = 32
_UNEVENTFUL = (MoveOutcome.MOVED, MoveOutcome.FINISHED, MoveOutcome.ENDED)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningRequest:
    """`worker`: where it generates; None while it waits for a place. `since_move_s`: since the last try to move it."""

    request_id: str
    worker: Incarnation | None
    role: Role | None
    num_prompt_tokens: int
    num_output_tokens: int
    priority: int
    age_s: float
    moving_to: Incarnation | None
    since_move_s: float | None
    excluded: frozenset[Incarnation]  # workers that have failed it


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveReport:
    """How a try ended. Seconds count from its begin; `gap_s` is what the client may have noticed: from the last
    token of the source to the first of the target.
    """

    request_id: str
    source: str
    target: str
    reason: MoveReason
    outcome: MoveOutcome
    detail: str
    num_tokens: int
    duration_s: float
    handed_over_s: float | None
    gap_s: float | None
    ended_unix_s: float

    def as_json(self) -> dict[str, object]:
        return {**asdict(self), "reason": self.reason.value, "outcome": self.outcome.value}


class Moves:
    """Used from one event loop. `running` is the dispatcher's."""

    def __init__(
        self,
        running: Collection[Progress],
        sessions: SessionPool,
        *,
        timeout_s: float,
        metrics: GatewayMetrics,
    ) -> None:
        self._running = running
        self._sessions = sessions
        self._timeout_s = timeout_s
        self._metrics = metrics
        self.recent: deque[MoveReport] = deque(maxlen=MAX_REMEMBERED_MOVES)

    def requests(self) -> list[RunningRequest]:
        """The oldest first."""
        return sorted(map(_describe, self._running), key=lambda request: -request.age_s)

    async def move(
        self, request_id: str, worker_id: str, *, reason: MoveReason = MoveReason.OPERATOR
    ) -> MoveReport:
        """Tries it; whatever comes of it, the request goes on, and its client hears nothing of it.

        Raises RequestNotFound, WorkerNotFound or CannotMove where it cannot be tried.
        """
        run = self._find(request_id)
        move = self._begin(run, self._target(run, worker_id))
        attempt = run.attempt
        assert attempt is not None, "a move began without an attempt"
        try:
            await asyncio.wait([move.ending], timeout=self._timeout_s)
            attempt.end_move(move, timed_out(move.target, timeout_s=self._timeout_s))
        finally:
            # Does nothing unless whoever waited is cancelled.
            attempt.end_move(move, given_up(move.target))
            report = self._account(run, move, reason)
        return report

    def _find(self, request_id: str) -> Progress:
        for run in self._running:
            if run.generation.request_id == request_id:
                return run
        # As the client knows it: the first of its choices, if no other one runs.
        choices = [run for run in self._running if run.generation.request_id.rpartition("-")[0] == request_id]
        if len(choices) == 1:
            return choices[0]
        raise RequestNotFound(f"no request {request_id!r} runs here")

    def _target(self, run: Progress, worker_id: str) -> WorkerSession:
        """Raises what speaks against this worker."""
        known = {session.member.worker_id: session for session in self._sessions.sessions()}
        session = known.get(WorkerId(worker_id))
        if session is None:
            names = ", ".join(sorted(name for name in known if known[name].member.role.can_decode))
            raise WorkerNotFound(f"there is no worker {worker_id!r} that could take it; there are {names}")
        member = session.member
        if not member.role.can_decode:
            raise CannotMove(f"{worker_id} is a {member.role.value} worker and does not generate")
        if run.model_fingerprint is not None and member.model.fingerprint != run.model_fingerprint:
            raise CannotMove(f"{worker_id} serves another model than {run.generation.request_id} needs")
        if member.is_draining:
            raise CannotMove(f"{worker_id} is draining and takes no requests")
        if not session.is_ready:
            raise CannotMove(f"{worker_id} cannot be reached")
        return session

    def _begin(self, run: Progress, target: WorkerSession) -> Move:
        request_id, attempt = run.generation.request_id, run.attempt
        if attempt is None:
            raise CannotMove(f"{request_id} waits for a worker and runs on none")
        if attempt.moving_to is not None:
            raise CannotMove(f"{request_id} moves to {attempt.moving_to.worker_id} already")
        if attempt.decode.worker_id == target.member.worker_id:
            raise CannotMove(f"{request_id} runs on {target.member.worker_id} already")
        if attempt.has_ended:
            raise CannotMove(f"{request_id} has just ended on {attempt.decode.worker_id}")
        try:
            move = attempt.begin_move(target, token_ids=run.merge.token_ids)
        except SessionClosed as error:
            raise CannotMove(f"{target.member.worker_id} cannot be reached") from error
        target.note_move(num_pages=num_pages_of(run.num_tokens))
        return move

    def _account(self, run: Progress, move: Move, reason: MoveReason) -> MoveReport:
        now_s = asyncio.get_running_loop().time()
        run.last_move_s = now_s
        ending = move.ending.result()
        report = MoveReport(
            request_id=run.generation.request_id,
            source=move.source.member.worker_id,
            target=move.target.member.worker_id,
            reason=reason,
            outcome=ending.outcome,
            detail=ending.detail,
            num_tokens=run.num_tokens,
            duration_s=now_s - move.began_s,
            handed_over_s=None if move.handed_over_s is None else move.handed_over_s - move.began_s,
            gap_s=None if move.switched_s is None else move.switched_s - move.last_source_token_s,
            ended_unix_s=time.time(),
        )
        self.recent.append(report)
        self._metrics.migrations.labels(report.outcome.value, report.reason.value).inc()
        if report.outcome is MoveOutcome.MOVED:
            self._metrics.migration_duration.observe(report.duration_s)
        level = logging.INFO if report.outcome in _UNEVENTFUL else logging.WARNING
        log_event(_log, "move_ended", level=level, **report.as_json())
        return report


def _describe(run: Progress) -> RunningRequest:
    attempt = run.attempt
    now_s = asyncio.get_running_loop().time()
    return RunningRequest(
        request_id=run.generation.request_id,
        worker=None if attempt is None else attempt.decode,
        role=None if attempt is None else attempt.role,
        num_prompt_tokens=len(run.generation.prompt_token_ids),
        num_output_tokens=len(run.merge.token_ids),
        priority=run.generation.priority,
        age_s=max(0.0, time.time() - run.arrival_unix_s),
        moving_to=None if attempt is None else attempt.moving_to,
        since_move_s=None if run.last_move_s is None else now_s - run.last_move_s,
        excluded=frozenset(run.excluded),
    )
