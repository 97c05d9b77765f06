"""How much memory the chunks on their way to all pullers may take together.

One connection has at most a few, but a puller that takes its bytes slowly keeps them, and there may be a hundred.
"""

import asyncio

from kvstore.errors import TransferRefused


class SendingRoom:
    """All of it runs in the thread of the event loop."""

    def __init__(self, *, capacity_bytes: int, wait_s: float) -> None:
        self.num_bytes = 0
        self._capacity_bytes = capacity_bytes
        self._wait_s = wait_s
        self._given = asyncio.Event()  # set, and replaced

    async def take(self, num_bytes: int) -> None:
        """Waits for others to give, but not for those who never do; what is alone always has room.

        Raises TransferRefused.
        """
        try:
            async with asyncio.timeout(self._wait_s):
                while self.num_bytes and self.num_bytes + num_bytes > self._capacity_bytes:
                    await self._given.wait()
        except TimeoutError:
            raise TransferRefused(
                f"{self.num_bytes} bytes are on their way to other pullers, at most {self._capacity_bytes} may be"
            ) from None
        self.num_bytes += num_bytes

    def give(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes
        self._given.set()
        self._given = asyncio.Event()
