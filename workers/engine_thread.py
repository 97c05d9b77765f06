"""The one thread in which an engine launches steps and reads their results, in the order in which it is asked to."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

from workers.engine.engine import Engine, LaunchedStep
from workers.step import StepPlan, StepResult

OnLayer = Callable[[int], None]
Launched = Future[LaunchedStep]


class EngineThread:
    """Left, it waits for what was asked of it, and for the device to be done with what was launched."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, "engine")
        self._last_launched: Launched | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if self._last_launched is not None:
            with contextlib.suppress(Exception):  # who asked for it has heard
                self._last_launched.result().wait()

    async def execute(self, plan: StepPlan, *, on_layer: OnLayer | None) -> StepResult:
        """Raises what the engine raises, as `result` does."""
        execute = partial(self._engine.execute, plan, on_layer=on_layer)
        return await asyncio.get_running_loop().run_in_executor(self._thread, execute)

    def launch(self, plan: StepPlan) -> Launched:
        """Returns at once."""
        self._last_launched = self._thread.submit(self._engine.launch, plan)
        return self._last_launched

    async def result(self, launched: Launched) -> StepResult:
        return await asyncio.get_running_loop().run_in_executor(self._thread, _read, launched)

    async def drop(self, launched: Launched) -> None:
        """A step after one that failed: over when this returns, whatever came of it."""
        with contextlib.suppress(Exception):
            await self.result(launched)


def _read(launched: Launched) -> StepResult:
    return launched.result().result()
