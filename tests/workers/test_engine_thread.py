"""The thread of an engine, with an engine whose device the test plays."""

from collections.abc import Callable
from typing import Any, cast

import pytest

from workers.engine.engine import Engine, LaunchedStep
from workers.engine_thread import EngineThread
from workers.step import StepPlan

EMPTY = StepPlan(rows=())


class FakeEngine:
    def __init__(self, waited: list[int], *, fails_at: int | None = None) -> None:
        self._waited, self._fails_at, self._num_launched = waited, fails_at, 0

    def launch(self, plan: StepPlan) -> LaunchedStep:
        number = self._num_launched
        self._num_launched += 1
        if number == self._fails_at:
            raise RuntimeError("no memory")
        return LaunchedStep([], list, wait=self._waits(number), stop_strings=cast(Any, None))

    def _waits(self, number: int) -> Callable[[], None]:
        return lambda: self._waited.append(number)


def thread_of(engine: FakeEngine) -> EngineThread:
    return EngineThread(cast(Engine, engine))


def test_a_thread_that_is_left_has_waited_for_the_last_step_on_the_device() -> None:
    waited: list[int] = []
    with thread_of(FakeEngine(waited)) as thread:
        thread.launch(EMPTY)
        thread.launch(EMPTY)
    assert waited == [1]  # steps are over in the order of their launches


def test_a_thread_that_launched_nothing_is_left_at_once() -> None:
    waited: list[int] = []
    with thread_of(FakeEngine(waited)):
        pass
    assert waited == []


async def test_a_step_that_could_not_be_launched_fails_its_result_and_not_the_leaving() -> None:
    waited: list[int] = []
    with thread_of(FakeEngine(waited, fails_at=1)) as thread:
        first, second = thread.launch(EMPTY), thread.launch(EMPTY)
        await thread.result(first)
        with pytest.raises(RuntimeError, match="no memory"):
            await thread.result(second)
    assert waited == [0]
