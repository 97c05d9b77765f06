"""gRPC channels to other workers, kept open between calls and bounded in number."""

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from workers.grpc_options import CHANNEL_OPTIONS


@dataclass(kw_only=True, slots=True)
class _Entry:
    channel: grpc.aio.Channel
    num_users: int = 0


class Channels:
    """One channel per target. Beyond `max_idle` unused ones are closed, the longest unused first."""

    def __init__(self, *, max_idle: int) -> None:
        self._max_idle = max_idle
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @asynccontextmanager
    async def use(self, target: str) -> AsyncIterator[grpc.aio.Channel]:
        """The channel stays open as long as the context."""
        entry = self._entries.get(target)
        if entry is None:
            entry = self._entries[target] = _Entry(
                channel=grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
            )
        entry.num_users += 1
        self._entries.move_to_end(target)
        try:
            yield entry.channel
        finally:
            entry.num_users -= 1
            await self._trim()

    async def close(self) -> None:
        """Ends all calls that still run."""
        while self._entries:
            _, entry = self._entries.popitem()
            await entry.channel.close(None)

    async def _trim(self) -> None:
        idle = [target for target, entry in self._entries.items() if entry.num_users == 0]
        for target in idle[: max(0, len(idle) - self._max_idle)]:
            await self._entries.pop(target).channel.close(None)
