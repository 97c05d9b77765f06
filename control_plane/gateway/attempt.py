"""One try at a generation on the workers of one placement."""

import asyncio
from dataclasses import dataclass

from control_plane.gateway import wire
from control_plane.gateway.sessions import SessionClosed, SessionLost, WorkerSession
from control_plane.gateway.wire import Assignment, WorkerOutput

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
    ends or fails does not matter, because the decode worker computes by itself what it does not get.
    """

    def __init__(
        self,
        assignment: Assignment,
        *,
        decode: WorkerSession,
        prefill: WorkerSession | None,
        timeout_s: float,
    ) -> None:
        self.decode = decode.member.incarnation
        self._assignment = assignment
        self._decode_session = decode
        self._prefill_session = prefill
        self._timeout_s = timeout_s
        self._max_deliveries = assignment.generation.sampling.max_tokens + NUM_SPARE_DELIVERIES
        self._deliveries: list[Delivery] = []
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._progress_s = self._loop.time()
        # One lazy timer per attempt: a new token moves the deadline without touching the timer.
        self._timer = self._loop.call_at(self._progress_s + timeout_s, self._on_timer)

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
        self._decode_session.abort(self._assignment.request_id)
        if self._prefill_session is not None:
            self._prefill_session.abort(self._assignment.request_id)

    def _on_decode(self, item: WorkerOutput | SessionLost) -> None:
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
