"""Work in threads on memory that others will use next."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

Result = TypeVar("Result")


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
