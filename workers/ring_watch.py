"""Notices that hand-overs of this worker wait for each other (workers.rings), and for how long."""

import asyncio
from collections.abc import Callable

from workers.exports import Exports
from workers.messages import RingLasts
from workers.rings import Ring
from workers.state import EngineState

# A puller that has pages is usually there within milliseconds; a ring would last until the lease is over.
GIVE_WAY_AFTER_S = 1.0


class RingWatch:
    def __init__(self, state: EngineState, exports: Exports, *, post: Callable[[RingLasts], None]) -> None:
        self._state = state
        self._exports = exports
        self._post = post
        self._timer: asyncio.TimerHandle | None = None

    def rested(self, *, step_number: int) -> None:
        """There is nothing to compute, after so many steps. Whether there is a ring is seen later: pullers come at any
        time."""
        if self._timer is None and self._state.waits_beside_leases:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(GIVE_WAY_AFTER_S, self._post, RingLasts(step_number))

    def lasting(self, message: RingLasts, *, step_number: int) -> Ring | None:
        """The ring, if nothing was done meanwhile."""
        self._timer = None
        return self._state.ring(self._exports.is_pulled) if message.step_number == step_number else None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
