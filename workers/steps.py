"""The steps of a worker, one after the other; the next is launched before the one under way is over where that can be.

begin       pages change hands
execute     in the engine's thread; numba and torch release the interpreter lock
apply       what was computed is recorded, and told
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Protocol

from workers.engine.engine import Engine
from workers.engine_thread import EngineThread, Launched
from workers.errors import EngineFailed
from workers.request import Purpose, RequestOutput
from workers.scheduler import SchedulerLimits
from workers.state import EngineState
from workers.step import ScheduledRequest, StepPlan, StepResult

# A step that fails may be the fault of one request; so many in a row are the fault of this process.
MAX_FAILED_STEPS = 3

_logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Who is told of steps, in the event loop's thread."""

    @property
    def waits_for_gap(self) -> bool:
        """Something is to be done between two steps."""
        ...

    def step_began(self, plan: StepPlan) -> None: ...

    def step_ended(self, plan: StepPlan, outputs: Sequence[RequestOutput], *, step_s: float) -> None: ...

    def next_goes_on(self) -> None:
        """The step after the one that has ended was launched ahead; there is no other gap before it."""
        ...

    def step_failed(self, plan: StepPlan, failure: EngineFailed) -> None:
        """Its rows are where they were before it."""
        ...

    def layer_computed(self, rows: Sequence[ScheduledRequest], layer: int) -> None:
        """Of a step that goes on: the last chunks of prompts that are computed for others."""
        ...


class Steps:
    """`number` counts them; it is that of the step under way, or of the last."""

    def __init__(
        self, state: EngineState, engine: Engine, limits: SchedulerLimits, *, listener: Listener
    ) -> None:
        self.number = 0
        self._state = state
        self._engine = engine
        self._limits = limits
        self._listener = listener
        self._num_failed = 0  # in a row

    async def run(self, plan: StepPlan, engine: EngineThread) -> None:
        """One step, and those after it that can be launched before the one before them is over.

        Raises `EngineFailed` if the engine has failed step after step.
        """
        self._begin(plan)
        launched: Launched | None = None
        began_s = time.monotonic()
        while True:
            self.number += 1
            ahead: tuple[StepPlan, Launched] | None = None
            if (following := self._look_ahead(plan)) is not None:
                launched = launched or engine.launch(plan)
                self._begin(following)
                ahead = following, engine.launch(following)
            try:
                if launched is None:
                    result = await self._execute(plan, engine)
                else:
                    result = await engine.result(launched)
            except Exception as error:
                _logger.exception("step_failed")
                if ahead is not None:  # it read what this one should have written
                    await engine.drop(ahead[1])
                    self._state.step_failed(ahead[0])
                self._fail(plan, error)
                return
            ended_s = time.monotonic()
            self._num_failed = 0
            outputs = self._state.apply(plan, result, now_s=time.time())
            self._listener.step_ended(plan, outputs, step_s=ended_s - began_s)
            if ahead is None:
                return
            self._listener.next_goes_on()
            (plan, launched), began_s = ahead, ended_s

    def _begin(self, plan: StepPlan) -> None:
        self._state.begin(plan, now_s=time.time())
        self._listener.step_began(plan)

    def _look_ahead(self, plan: StepPlan) -> StepPlan | None:
        if self._listener.waits_for_gap or not self._engine.can_launch_after(plan):
            return None
        return self._state.look_ahead(plan, self._limits)

    async def _execute(self, plan: StepPlan, engine: EngineThread) -> StepResult:
        if not plan.rows:
            return StepResult(sampled={})
        loop = asyncio.get_running_loop()
        # The last chunk of a prompt that somebody waits for: its blocks leave layer by layer.
        exported = [row for row in plan.rows if row.samples and row.request.purpose is Purpose.PREFILL_ONLY]

        def on_layer(layer: int) -> None:
            loop.call_soon_threadsafe(self._listener.layer_computed, exported, layer)

        return await engine.execute(plan, on_layer=on_layer if exported else None)

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        self._num_failed += 1
        self._state.step_failed(plan)
        failure = EngineFailed(f"step {self.number} failed: {type(error).__name__}: {error}")
        self._listener.step_failed(plan, failure)
        if self._num_failed >= MAX_FAILED_STEPS:
            raise EngineFailed(f"{self._num_failed} steps in a row have failed") from error
