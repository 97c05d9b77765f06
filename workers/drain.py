"""How a worker leaves: it takes nothing new, ends what it has, and goes; a deadline is the backstop.

What it has are its requests, until they have finished or moved, and the leases of what it computed for others, until
they are pulled; then the blocks on their way to memory and to the stores. Every block is on its way down from the
moment it is full, so that what a disk or a store is to have, it has by then, unless the store was away. So the most
valuable blocks of memory that its own disk does not hold are offered once more, to the stores or, where there are none,
to the others of its pool: who has them already says so. They are waited for as all others are, but a deadline that cuts
them off is no loss of a request. What lies in device pages alone, or is worth less, is computed again where it is
missed. Who pulls blocks by their keys is not waited for: it computes what it does not get.
"""

import asyncio
import contextlib
import math
from collections.abc import Awaitable
from dataclasses import dataclass

# So many of the requests that are left are named.
MAX_NAMED_REQUESTS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Left:
    """What a worker has not finished: requests that run or wait, and those computed for others, which nobody pulled."""

    num_requests: int = 0
    num_leases: int = 0
    num_pages: int = 0  # that these hold
    num_blocks: int = 0  # on their way to memory, and to stores that answer
    num_extra_blocks: int = 0  # offered once more, beside those; to be cut off there is no loss
    request_ids: tuple[str, ...] = ()

    @property
    def is_nothing(self) -> bool:
        return not (self.num_requests or self.num_leases or self.num_blocks)


class Drain:
    """Begun by a signal or an RPC; the worker does it. Made inside a running event loop."""

    def __init__(self, *, timeout_s: float) -> None:
        self.left = Left()  # when the worker has stopped
        self._stopped = asyncio.Event()
        self._timeout_s = timeout_s
        self._deadline_s = math.inf
        self._limit: asyncio.Timeout | None = None
        self._begun = asyncio.Event()

    @property
    def is_draining(self) -> bool:
        return self._begun.is_set()

    def begin(self, timeout_s: float | None = None) -> None:
        """None: the worker's own deadline. Again: a shorter deadline counts."""
        now_s = asyncio.get_running_loop().time()
        deadline_s = now_s + (self._timeout_s if timeout_s is None else timeout_s)
        self._deadline_s = min(self._deadline_s, deadline_s)
        if self._limit is not None:
            self._limit.reschedule(self._deadline_s)
        self._begun.set()

    async def begun(self) -> None:
        await self._begun.wait()

    def stopped(self, left: Left) -> None:
        """The worker does no more; who waits for that is told what it leaves."""
        self.left = left
        self._stopped.set()

    async def until_stopped(self) -> Left:
        await self._stopped.wait()
        return self.left

    async def finish(self, work: Awaitable[None]) -> None:
        """Returns when `work` has ended, or is cancelled at the deadline."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._deadline_s) as self._limit:
                try:
                    await work
                finally:
                    self._limit = None
