"""The loop that moves requests by itself: look, plan, move, account. The plan is `control_plane.migration`'s."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from control_plane.directory.member import Incarnation
from control_plane.errors import RequestError
from control_plane.gateway.logs import log_event
from control_plane.gateway.move import MoveOutcome
from control_plane.gateway.moves import Moves, RunningRequest
from control_plane.gateway.sessions import SessionPool
from control_plane.migration import (
    MigrationLimits,
    MigrationView,
    MoveReason,
    PlannedMove,
    RequestView,
    plan_moves,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RebalanceSettings:
    """`interval_s`: between two looks, and so long a worker's report may lag behind what was moved away."""

    limits: MigrationLimits
    interval_s: float


class Rebalancer:
    """Moves what this gateway has; others look after theirs. Used from one event loop."""

    def __init__(self, moves: Moves, sessions: SessionPool, *, settings: RebalanceSettings) -> None:
        self._moves = moves
        self._sessions = sessions
        self._settings = settings
        self._left_s: dict[Incarnation, float] = {}  # when a request left this worker last
        self._under_way: dict[str, PlannedMove] = {}
        self._look_again = asyncio.Event()

    async def run(self) -> NoReturn:
        """Until cancelled, which gives up what is under way."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                for planned in plan_moves(self._view(), self._settings.limits):
                    self._under_way[planned.request_id] = planned
                    tasks.create_task(self._move(planned))
                self._look_again.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.interval_s):
                        await self._look_again.wait()

    def _view(self) -> MigrationView:
        now_s = asyncio.get_running_loop().time()
        interval_s = self._settings.interval_s
        self._left_s = {worker: at_s for worker, at_s in self._left_s.items() if now_s - at_s < interval_s}
        return MigrationView(
            workers=tuple(session.view() for session in self._sessions.sessions()),
            requests=tuple(self._requests(self._moves.requests())),
            unsettled=frozenset(self._left_s),
        )

    def _requests(self, running: Sequence[RunningRequest]) -> Iterator[RequestView]:
        """What is under way counts at its source until it is accounted for, so that no other move begins there."""
        for request in running:
            under_way = self._under_way.get(request.request_id)
            worker = under_way.source if under_way is not None else request.worker
            if worker is not None:
                yield RequestView(
                    request_id=request.request_id,
                    worker=worker,
                    num_tokens=request.num_prompt_tokens + request.num_output_tokens,
                    priority=request.priority,
                    is_moving=under_way is not None or request.moving_to is not None,
                    rested_s=float("inf") if request.since_move_s is None else request.since_move_s,
                    excluded=request.excluded,
                )

    async def _move(self, planned: PlannedMove) -> None:
        try:
            report = await self._moves.move(
                planned.request_id, planned.target.worker_id, reason=planned.reason
            )
        except RequestError as error:  # it ended, or the target left, since the plan was made
            log_event(
                _log,
                "move_not_tried",
                request_id=planned.request_id,
                target=planned.target.worker_id,
                reason=planned.reason.value,
                detail=error.message,
            )
            return
        finally:
            del self._under_way[planned.request_id]
        if report.outcome is MoveOutcome.MOVED:
            self._left_s[planned.source] = asyncio.get_running_loop().time()
            if planned.reason is MoveReason.DRAIN:
                # The next one at once: whoever drains waits for it, and only what has moved is worth another look.
                self._look_again.set()
