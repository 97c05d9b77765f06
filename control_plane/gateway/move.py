"""One try at letting another worker go on with a running request: what its target's words mean, and how it ends.

The target pulls the request from the worker it runs on, which goes on with it until its last blocks travel. So until
the target's first tokens the source's count, from then on the target's; and whatever the target says before those, but
that it has them, ends the try and leaves the request where it is.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from control_plane.gateway.sessions import SessionLost, WorkerSession
from control_plane.gateway.wire import FINISH_REASONS, FailureCode, Outcome, WorkerFailure, WorkerOutput


class MoveOutcome(Enum):
    """How a try ended. Only after SOURCE_LOST, and after a target that failed with all in its hands, is it felt."""

    MOVED = "moved"
    REFUSED = "refused"  # by the target, or by the source when the target asked for the request
    TARGET_LOST = "target_lost"
    DIVERGED = "diverged"  # the target's tokens are not those that the client has
    TIMED_OUT = "timed_out"
    FINISHED = "finished"  # where it was, before it could move
    SOURCE_LOST = "source_lost"
    ENDED = "ended"  # the client left, or this gateway stops


@dataclass(frozen=True, slots=True)
class Ending:
    """`failure`: what the attempt fails with if the source has handed the request over already."""

    outcome: MoveOutcome
    detail: str = ""
    failure: WorkerOutput | SessionLost | None = None


class Move:
    """Bookkeeping of one try. Its attempt tells it what both workers say, and alone acts on what comes of it."""

    def __init__(
        self, request_id: str, *, source: WorkerSession, target: WorkerSession, token_ids: Sequence[int]
    ) -> None:
        loop = asyncio.get_running_loop()
        self.request_id = request_id  # at the target
        self.source = source
        self.target = target
        self.ending: asyncio.Future[Ending] = loop.create_future()
        self.began_s = self.last_source_token_s = loop.time()
        self.handed_over_s: float | None = None  # when the source said so
        self.switched_s: float | None = None
        self._token_ids = list(token_ids)
        self._time_s = loop.time

    def note_source(self, output: WorkerOutput) -> None:
        """What the client gets from the source while the try is under way."""
        num_new = output.first_token_number + len(output.token_ids) - len(self._token_ids)
        if 0 < num_new <= len(output.token_ids):
            self._token_ids += output.token_ids[-num_new:]
            self.last_source_token_s = self._time_s()

    def note_handed_over(self) -> None:
        self.handed_over_s = self._time_s()

    def note_switched(self) -> None:
        self.switched_s = self._time_s()

    def judge(self, item: WorkerOutput | SessionLost) -> Ending | None:
        """What the target's next word means; None: it is still at it."""
        if isinstance(item, SessionLost):
            return Ending(MoveOutcome.TARGET_LOST, item.reason, failure=item)
        if item.outcome is not None and item.outcome not in FINISH_REASONS:
            return Ending(MoveOutcome.REFUSED, _why(item), failure=item)
        if not item.token_ids and item.outcome is None:
            return None
        contradiction = self._contradiction(item)
        if contradiction:
            return _diverged(f"{self.target.member.incarnation} {contradiction}")
        return Ending(MoveOutcome.MOVED)

    def _contradiction(self, output: WorkerOutput) -> str:
        """Of the sequence so far. Tokens are numbered, so who repeats one must say the same."""
        known, first = self._token_ids, output.first_token_number
        if first > len(known):
            return f"begins with token {first}, but token {len(known)} is missing"
        for number, token_id in enumerate(output.token_ids[: len(known) - first], start=first):
            if token_id != known[number]:
                return f"has {token_id} as token {number}, which was {known[number]}"
        return ""


def timed_out(target: WorkerSession, *, timeout_s: float) -> Ending:
    detail = f"{target.member.incarnation} had not taken it over after {timeout_s:g} s"
    return Ending(MoveOutcome.TIMED_OUT, detail, failure=_failed(FailureCode.UNAVAILABLE, detail))


def given_up(target: WorkerSession) -> Ending:
    detail = f"nobody waits any more for {target.member.incarnation} to take it over"
    return Ending(MoveOutcome.ENDED, detail, failure=_failed(FailureCode.UNAVAILABLE, detail))


def _diverged(detail: str) -> Ending:
    return Ending(MoveOutcome.DIVERGED, detail, failure=_failed(FailureCode.INTERNAL, detail))


def _failed(code: FailureCode, message: str) -> WorkerOutput:
    return WorkerOutput(
        first_token_number=0,
        token_ids=(),
        outcome=Outcome.FAILED,
        failure=WorkerFailure(code, message),
    )


def _why(output: WorkerOutput) -> str:
    if output.failure is not None:
        return output.failure.message
    assert output.outcome is not None, "asked why an output ends that does not"
    return f"the target ended it as {output.outcome.value}"
