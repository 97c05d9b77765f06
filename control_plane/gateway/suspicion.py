"""Whether workers die of a request: it has lost two in a row at the same token, and neither of them is back.

Who got further with it than the one that died has shown that it is not the request. Nor is a lost session a death by
itself: a gateway that was stopped for some seconds finds the sessions with all its workers broken, one a moment after
the other, and a request that goes from the first to the second loses both.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from control_plane.directory.member import Incarnation
from control_plane.errors import PoisonRequest
from control_plane.gateway.sessions import SessionPool

NUM_DEATHS_OF_POISON = 2


@dataclass(slots=True)
class Suspicion:
    """Of one request. `lost`: incarnations, since it has come to `num_tokens`."""

    num_tokens: int = 0
    lost: set[Incarnation] = field(default_factory=set)

    def note(self, incarnation: Incarnation, *, num_tokens: int) -> None:
        """Its worker was lost when the request had so many output tokens."""
        if num_tokens != self.num_tokens:
            self.lost.clear()
        self.num_tokens = num_tokens
        self.lost.add(incarnation)

    def forget(self, is_alive: Callable[[Incarnation], bool]) -> None:
        """Those that are back have not died."""
        self.lost = {incarnation for incarnation in self.lost if not is_alive(incarnation)}

    @property
    def is_serious(self) -> bool:
        return len(self.lost) >= NUM_DEATHS_OF_POISON


async def judge(suspicion: Suspicion, sessions: SessionPool, *, wait_s: float) -> None:
    """Waits for those it lost to come back or to be given up. Raises PoisonRequest if it is serious then."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            while True:
                suspicion.forget(sessions.is_ready)
                if not suspicion.is_serious or not any(map(sessions.get, suspicion.lost)):
                    break
                await sessions.wait_for_change()
    if suspicion.is_serious:
        workers = " and ".join(sorted(worker_id for worker_id, _ in suspicion.lost))
        raise PoisonRequest(
            f"two workers died in a row when they came to token {suspicion.num_tokens} of this request"
            f" ({workers}); do not send it again"
        )
