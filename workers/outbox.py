"""What a worker has yet to say to one gateway."""

import asyncio
from collections import deque
from collections.abc import Sequence

from protos import worker_pb2
from workers.errors import WorkerError
from workers.request import RequestOutput
from workers.wire import output_to_wire, refusal_to_wire, step_to_wire

# Steps a gateway may be behind. At 20 ms a step it has 20 s to read on before its session ends.
MAX_UNREAD_STEPS = 1024


class Outbox:
    """Bounded: past the bound `overflowed` is set, nothing more is kept, and the session is to end.

    One reader; all calls come from the event loop.
    """

    def __init__(self, *, max_steps: int = MAX_UNREAD_STEPS) -> None:
        self._max_steps = max_steps
        self._events: deque[worker_pb2.SessionEvent] = deque()
        self._is_closed = False
        self._filled = asyncio.Event()
        self.overflowed = asyncio.Event()

    def put(self, step_number: int, outputs: Sequence[RequestOutput]) -> None:
        """All that one step has to say."""
        self._put(step_to_wire(step_number, [output_to_wire(output) for output in outputs]))

    def put_refusal(self, request_id: str, error: WorkerError) -> None:
        """The end of a request that never began."""
        self._put(step_to_wire(0, [refusal_to_wire(request_id, error)]))

    def close(self) -> None:
        """Nothing more comes; what is there can still be had."""
        self._is_closed = True
        self._filled.set()

    async def get(self) -> worker_pb2.SessionEvent | None:
        """None: that was all."""
        while not self._events:
            if self._is_closed:
                return None
            self._filled.clear()
            await self._filled.wait()
        return self._events.popleft()

    def _put(self, event: worker_pb2.SessionEvent) -> None:
        if len(self._events) >= self._max_steps:
            self.overflowed.set()
            return
        self._events.append(event)
        self._filled.set()
