"""Work in threads on memory that others will use next."""

import asyncio
import contextlib
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from typing import Any, TypeVar

Result = TypeVar("Result")


async def cancel_to_end(tasks: Collection["asyncio.Task[Any]"]) -> None:
    """Returns when all have ended, however often this is cancelled meanwhile."""
    for task in tasks:
        task.cancel()
    cancelled = False
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


async def run_to_end(executor: Executor, work: Callable[[], Result]) -> Result:
    """Runs `work` in a thread. Cancelled, it waits until the thread has ended: then nobody uses its memory any more."""
    future = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({future})
        future.exception()  # looked at, so that nobody is told of one that nobody waits for
        raise
