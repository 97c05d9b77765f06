"""The hand-overs and moves that are being pulled: a task each, which ends with a message, never with an exception."""

import asyncio
import logging
import time
from collections.abc import Callable

from workers.errors import PullError
from workers.handoff import Puller
from workers.logs import log_event
from workers.messages import PullEnded
from workers.metrics import WorkerMetrics
from workers.request import Handoff, KvSource, RequestId
from workers.step import Pull

_CANCELLED = PullError("it was cancelled")

_logger = logging.getLogger(__name__)


class PullTasks:
    """`post` hears of every end. A pull counts as under way until its end is taken note of by `ended`."""

    def __init__(
        self, puller: Puller, *, block_bytes: int, metrics: WorkerMetrics, post: Callable[[PullEnded], None]
    ) -> None:
        self._puller = puller
        self._block_bytes = block_bytes
        self._metrics = metrics
        self._post = post
        self._tasks: dict[RequestId, asyncio.Task[Handoff | PullError]] = {}

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, pull: Pull) -> None:
        request_id = pull.request.request_id
        task = asyncio.create_task(self._pull(pull), name=f"pull {request_id}")
        self._tasks[request_id] = task
        # A callback and not the task itself says that it has ended: a task may be cancelled before its first line.
        task.add_done_callback(
            lambda done: self._post(PullEnded(request_id, _CANCELLED if done.cancelled() else done.result()))
        )

    def cancel(self, request_id: RequestId) -> None:
        """Does nothing if none is under way."""
        if (task := self._tasks.get(request_id)) is not None:
            task.cancel()

    def ended(self, request_id: RequestId) -> None:
        del self._tasks[request_id]

    def release(self, source: KvSource) -> None:
        """Tells the source in the background that a request that ran there runs here now."""
        self._puller.release(source)

    async def close(self) -> None:
        """Cancels all and returns when none writes to pages any more."""
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _pull(self, pull: Pull) -> Handoff | PullError:
        started_s = time.monotonic()
        try:
            handoff = await self._puller.pull(pull)
        except PullError as error:
            self._metrics.pull_failed()
            log_event(
                _logger,
                "pull_failed",
                level=logging.WARNING,
                request=pull.request.request_id,
                error=type(error).__name__,
                detail=str(error),
            )
            return error
        except Exception as error:
            self._metrics.pull_failed()
            _logger.exception("pull_failed")
            return PullError(f"{type(error).__name__}: {error}")
        num_bytes = (len(pull.page_ids) - pull.first_block) * self._block_bytes
        self._metrics.pull_done(num_bytes=num_bytes, pull_s=time.monotonic() - started_s)
        return handoff
