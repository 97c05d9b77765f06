"""Requests of this worker that others pull while they run: opened for a puller, frozen between two steps, ended.

`workers.moves` says who may move and when; the export (workers.exports) carries the blocks.
"""

import time

from workers.errors import QueueFull
from workers.exports import Exports, NoSuchExport
from workers.moves import Room, must_freeze
from workers.request import RequestId
from workers.state import EngineState

RETRY_AFTER_S = 0.5


class LiveMoves:
    """All methods are called in the event loop's thread, and all but `open` between two steps, one of which may have
    been launched ahead: what that one gives for a request that was frozen meanwhile is dropped."""

    def __init__(self, state: EngineState, exports: Exports, *, max_moves: int) -> None:
        self._state = state
        self._exports = exports
        self._max_moves = max_moves
        self._open: dict[RequestId, Room] = {}  # of each that moves

    def open(self, request_id: RequestId, *, num_pages: int) -> None:
        """May be called while a step executes. Raises NoSuchExport, and QueueFull if too many move at a time."""
        if len(self._open) >= self._max_moves:
            raise QueueFull(
                f"{len(self._open)} requests move from here, the most at a time",
                retry_after_s=RETRY_AFTER_S,
            )
        if not self._state.open_move(request_id, num_pages=num_pages):
            raise NoSuchExport(
                f"request {request_id!r} cannot move to {num_pages} pages: unknown, ended, pulled itself, or too long"
            )
        self._open[request_id] = Room(num_pages, num_known_tokens=self._state.num_tokens(request_id))
        self._exports.open_live(request_id, max_blocks=num_pages)

    def step_ended(self) -> tuple[RequestId, ...]:
        """Freezes those that would outgrow their puller's room, and says which."""
        grown = [
            request.request_id
            for request in self._state.moving()
            if must_freeze(request, self._open[request.request_id])
        ]
        return tuple(request_id for request_id in grown if self.freeze(request_id))

    def freeze(self, request_id: RequestId) -> bool:
        """The puller has all that is ready, or can have no more: the last of it travels now. False: it does already."""
        return self._state.freeze(request_id, now_s=time.time())

    def stay(self, request_id: RequestId) -> bool:
        """The puller does not have the request: it goes on here. Whether it was frozen."""
        self._open.pop(request_id, None)
        return self._state.end_move(request_id, now_s=time.time())

    def gone(self, request_id: RequestId) -> None:
        """The request has ended here, for whatever reason."""
        if self._open.pop(request_id, None) is not None:
            self._exports.close(request_id)
