"""How the block store reaches its disk: what it asks of it, and the threads in which it waits for it."""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstore.blocks import BlockKey
from kvstore.tiers.tier import BlockRun, HeldPrefix, TierStats

_logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class Disk(Protocol):
    """Thread-safe. `write`, `read` and `erase_dropped` wait for the device, all else answers from memory."""

    def __contains__(self, key: BlockKey) -> bool: ...

    def run(self, keys: Sequence[BlockKey]) -> BlockRun | None:
        """The leading ones of these consecutive blocks that are held, with their place in the chain."""

    def write(self, run: BlockRun, blocks: Sequence[NDArray[np.uint8]]) -> None:
        """Raises DiskFailed. Blocks that are there already are skipped."""

    def read(self, keys: Sequence[BlockKey], into: Sequence[NDArray[np.uint8]]) -> int:
        """How many leading blocks were read and are what was written."""

    def drop(self, root: BlockKey | None) -> int: ...

    def erase_dropped(self) -> None: ...

    def take_changes(self) -> tuple[list[BlockKey], list[BlockKey]]:
        """What came and what left since the last call."""

    def stats(self) -> TierStats: ...

    def prefixes(self, max_prefixes: int) -> list[HeldPrefix]: ...

    def close(self) -> None: ...


class IoThread:
    """One thread that does one job at a time for the event loop.

    It is a daemon, unlike the threads of an executor: a disk that hangs must not keep the process from ending.
    """

    def __init__(self, name: str, *, max_jobs: int) -> None:
        self._max_jobs = max_jobs
        self._num_jobs = 0
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], _Result]) -> "asyncio.Future[_Result] | None":
        """What the job returns or raises; None if too many are waiting. To cancel the future does not stop the job."""
        return None if self._num_jobs >= self._max_jobs else self._enqueue(job)

    async def close(self, *, timeout_s: float) -> None:
        """Ends once its jobs are done; left behind, and said so, if they are not within `timeout_s`. Idempotent."""
        if self._max_jobs == 0:
            return
        self._max_jobs = 0
        last = self._enqueue(lambda: None)
        self._jobs.put(None)
        try:
            async with asyncio.timeout(timeout_s):
                await last
        except TimeoutError:
            _logger.warning("%s still waits for its disk after %g s", self._thread.name, timeout_s)
        else:
            self._thread.join()

    def _enqueue(self, job: Callable[[], _Result]) -> "asyncio.Future[_Result]":
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Result] = loop.create_future()
        self._num_jobs += 1

        def deliver(result: _Result | None, error: Exception | None) -> None:
            self._num_jobs -= 1
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def run() -> None:
            result, failure = None, None
            try:
                result = job()
            except Exception as error:  # noqa: BLE001 - a task root: whoever waits for the job gets it
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever waited
                loop.call_soon_threadsafe(deliver, result, failure)

        self._jobs.put(run)
        return future

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
