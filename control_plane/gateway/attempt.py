"""One try at a generation, on the workers of one placement and on those it moves to."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from control_plane.directory.member import Incarnation, Role
from control_plane.gateway import wire
from control_plane.gateway.move import Ending, Move, MoveOutcome
from control_plane.gateway.sessions import SessionClosed, SessionLost, WorkerSession
from control_plane.gateway.wire import FINISH_REASONS, Assignment, Outcome, WorkerOutput

# What may wait for a slow client: every token it asked for in an output of its own, and a few that say no token.
NUM_SPARE_DELIVERIES = 64


@dataclass(frozen=True, slots=True)
class TimedOut:
    """No token came for so long."""

    timeout_s: float


@dataclass(frozen=True, slots=True)
class Flooded:
    """The decode worker sent more than the request can have."""

    num_deliveries: int


Delivery = WorkerOutput | SessionLost | TimedOut | Flooded


class Attempt:
    """`start` it, `take` from it, and always `close` it, which aborts what is still running anywhere.

    Only `take` waits, so that closing cannot be interrupted. The prefill worker may add its first token; how it
    ends or fails does not matter, because the decode worker computes by itself what it does not get. `decode` is who
    generates now: whoever is to blame for a failure.
    """

    def __init__(
        self,
        assignment: Assignment,
        *,
        decode: WorkerSession,
        prefill: WorkerSession | None,
        timeout_s: float,
    ) -> None:
        self._assignment = assignment
        self._decode_session = decode
        self._decode_request_id = assignment.request_id
        self._num_decoded = len(assignment.output_token_ids)  # tokens that the decode worker has
        self._has_ended = False  # as far as the decode worker is concerned
        self._prefill_session = prefill
        self._move: Move | None = None
        self._num_moves = 0
        self._timeout_s = timeout_s
        self._max_deliveries = assignment.generation.sampling.max_tokens + NUM_SPARE_DELIVERIES
        self._deliveries: list[Delivery] = []
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._progress_s = self._loop.time()
        # One lazy timer per attempt: a new token moves the deadline without touching the timer.
        self._timer = self._loop.call_at(self._progress_s + timeout_s, self._on_timer)

    @property
    def decode(self) -> Incarnation:
        return self._decode_session.member.incarnation

    @property
    def role(self) -> Role:
        return self._decode_session.member.role

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes from the decode worker. What came may not have been taken yet."""
        return self._has_ended

    @property
    def moving_to(self) -> Incarnation | None:
        return None if self._move is None else self._move.target.member.incarnation

    @property
    def computes(self) -> WorkerSession:
        """Whose turn the prompt is; the decode worker's too if the prefill worker could not be reached."""
        return self._prefill_session or self._decode_session

    def start(self) -> None:
        """Raises SessionClosed if the decode worker cannot be reached."""
        kv_source = None
        if self._prefill_session is not None:
            try:
                self._prefill_session.submit(wire.write_prefill(self._assignment), sink=self._on_prefill)
                kv_source = self._prefill_session.member
            except SessionClosed:
                self._prefill_session = None
                self._assignment = self._assignment.without_holder(self.decode)
        self._decode_session.submit(
            wire.write_generate(self._assignment, kv_source=kv_source), sink=self._on_decode
        )

    def begin_move(self, target: WorkerSession, *, token_ids: Sequence[int]) -> Move:
        """Lets `target` pull the request; `token_ids` are all that were taken from here and before.

        Raises SessionClosed if it cannot be reached, and then nothing has happened.
        """
        assert self._move is None, f"{self._decode_request_id} moves already"
        assert not self._has_ended, f"{self._decode_request_id} has ended"
        self._num_moves += 1
        assignment = replace(
            self._assignment,
            request_id=f"{self._assignment.request_id}.{self._num_moves}",
            # What the target is told must not be more than what it will pull: the prefill worker may be ahead.
            output_token_ids=tuple(self._sequence(token_ids)[: self._num_decoded]),
            kv_holders=(),
        )
        move = Move(
            assignment.request_id,
            source=self._decode_session,
            target=target,
            token_ids=self._sequence(token_ids),
        )
        source = self._decode_session.member
        message = wire.write_move(assignment, source=source, source_request_id=self._decode_request_id)
        target.submit(message, sink=partial(self._on_target, move))
        self._move = move
        return move

    def end_move(self, move: Move, ending: Ending) -> None:
        """Gives it up, if it is still under way: the request goes on where it is."""
        if move is self._move:
            self._end_move(ending)

    async def take(self) -> list[Delivery]:
        """All that has come since the last time; waits for the first."""
        if not self._deliveries:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        taken, self._deliveries = self._deliveries, []
        return taken

    def close(self) -> None:
        self._timer.cancel()
        self._has_ended = True
        if self._move is not None:
            self._end_move(Ending(MoveOutcome.ENDED))
        self._decode_session.abort(self._decode_request_id)
        if self._prefill_session is not None:
            self._prefill_session.abort(self._assignment.request_id)

    def _sequence(self, token_ids: Sequence[int]) -> list[int]:
        """Those that were taken and those that wait to be."""
        known = list(token_ids)
        for delivery in self._deliveries:
            if isinstance(delivery, WorkerOutput):
                known += delivery.token_ids[max(0, len(known) - delivery.first_token_number) :]
        return known

    def _on_decode(self, item: WorkerOutput | SessionLost) -> None:
        if isinstance(item, SessionLost) or item.outcome is not None:
            self._has_ended = True
        if isinstance(item, WorkerOutput):
            self._num_decoded = max(self._num_decoded, item.first_token_number + len(item.token_ids))
        if self._move is None:
            self._deliver(item)
        else:
            self._on_source(self._move, item)

    def _on_source(self, move: Move, item: WorkerOutput | SessionLost) -> None:
        """What the worker says that the request is about to leave."""
        if isinstance(item, SessionLost):
            self._end_move(Ending(MoveOutcome.SOURCE_LOST, item.reason))
            self._deliver(item)
            return
        move.note_source(item)
        if item.outcome is Outcome.HANDED_OVER:
            # The target has all of it, and goes on; it has just not said so yet.
            move.note_handed_over()
            self._switch(move)
            item.outcome = None
            if not item.token_ids:
                return
        elif item.outcome in FINISH_REASONS:
            self._end_move(Ending(MoveOutcome.FINISHED))
        elif item.outcome is not None:
            self._end_move(Ending(MoveOutcome.SOURCE_LOST, f"the source ended it as {item.outcome.value}"))
        self._deliver(item)

    def _on_target(self, move: Move, item: WorkerOutput | SessionLost) -> None:
        if move is not self._move:  # it has moved, and its target is the decode worker now
            self._on_decode(item)
            return
        ending = move.judge(item)
        if ending is None:
            return
        if ending.outcome is not MoveOutcome.MOVED:
            self._end_move(ending)
            return
        if self._decode_session is not move.target:
            self._switch(move)
        move.note_switched()
        self._move = None
        move.ending.set_result(ending)
        self._on_decode(item)

    def _switch(self, move: Move) -> None:
        """From now on only the target's tokens count."""
        self._decode_session.abort(self._decode_request_id)
        if self._prefill_session is not None:  # the target pulls from the source alone
            self._prefill_session.abort(self._assignment.request_id)
        self._decode_session, self._decode_request_id = move.target, move.request_id
        self._has_ended = False

    def _end_move(self, ending: Ending) -> None:
        """Without success: after it, the target is told no more of it and nobody listens to it."""
        move, self._move = self._move, None
        assert move is not None, "no move is under way"
        move.target.abort(move.request_id)
        move.ending.set_result(ending)
        if move.target is self._decode_session and ending.failure is not None:
            self._on_decode(ending.failure)  # the source has let go of it, so nobody has it now

    def _deliver(self, item: WorkerOutput | SessionLost) -> None:
        if len(self._deliveries) < self._max_deliveries:
            self._put(item)
        elif len(self._deliveries) == self._max_deliveries:
            self._put(Flooded(self._max_deliveries))

    def _on_prefill(self, item: WorkerOutput | SessionLost) -> None:
        # Only what surely continues the sequence: a confused prefill worker must not fail a healthy generation. Its
        # events come with the hand-over.
        if isinstance(item, WorkerOutput) and item.token_ids and item.first_token_number == 0:
            self._put(
                WorkerOutput(
                    first_token_number=0,
                    token_ids=item.token_ids[:1],
                    logprobs=item.logprobs[:1],
                    num_cached_tokens=item.num_cached_tokens,
                )
            )

    def _put(self, item: Delivery) -> None:
        self._progress_s = self._loop.time()
        self._deliveries.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _on_timer(self) -> None:
        due_s = self._progress_s + self._timeout_s
        if due_s > self._loop.time():
            self._timer = self._loop.call_at(due_s, self._on_timer)
        else:
            self._put(TimedOut(self._timeout_s))
