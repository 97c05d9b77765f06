"""A preempted request comes back from memory, whatever of it had a copy before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.blocks import BlockKey
from tests.workers.loading_ends import SOON_S, End, FixedCosts, running_end
from tests.workers.test_scheduler import add, new_limits, new_state, step
from workers.computed_blocks import ComputedRun
from workers.request import Request, RequestId
from workers.swap import Swap

# Two of these need 24 of the 16 pages: the second one is preempted.
PROMPTS = [[number + 3] * 60 for number in range(2)]
# Nothing is copied before there is a run of a whole batch, unless somebody asks for it.
LINGERING: dict[str, Any] = {
    "num_pages": 16, "run_blocks": 64, "linger_s": SOON_S, "max_lingering_share": 1.0
}  # fmt: skip


@pytest.fixture
async def expected(checkpoint: Path) -> list[list[int]]:
    async with running_end(checkpoint, num_pages=16) as alone:
        return [(await alone.answer(prompt, max_tokens=120))[0] for prompt in PROMPTS]


async def answers(end: End) -> list[list[int]]:
    """Of both at once."""
    request_ids = [
        end.submit(prompt, max_tokens=120, arrival_s=float(number)) for number, prompt in enumerate(PROMPTS)
    ]
    lasts = [await end.ended(request_id) for request_id in request_ids]
    assert "preempted" in [stamp.name for stamp in lasts[1].timeline]
    return [
        [token for output in end.ear.outputs[request_id] for token in output.token_ids]
        for request_id in request_ids
    ]


async def test_what_had_no_copy_gets_one_before_its_pages_are_reused(
    checkpoint: Path, expected: Sequence[list[int]]
) -> None:
    async with running_end(checkpoint, **LINGERING) as end:
        assert await answers(end) == expected
        assert end.num_loaded["memory"] > 0
        await end.settled()


async def test_what_is_sooner_computed_than_copied_is_computed(
    checkpoint: Path, expected: Sequence[list[int]]
) -> None:
    async with running_end(checkpoint, **LINGERING) as end:
        end.costs.s_per_token = 0.0
        assert await answers(end) == expected
        assert end.num_loaded == {}
        await end.settled()


class Recorder:
    """A loader and a write-behind that do nothing but remember."""

    def __init__(self) -> None:
        self.saved: list[ComputedRun] = []
        self.loads: list[str] = []
        self.copying = False

    def save_at_once(self, computed: ComputedRun) -> None:
        self.saved.append(computed)

    def is_on_its_way(self, keys: Sequence[BlockKey]) -> bool:
        return self.copying

    def copy_s(self, num_blocks: int) -> float:
        return 0.001 * num_blocks

    def begin(self, request: Request) -> None:
        self.loads.append(request.request_id)

    def end(self, request_id: RequestId) -> None:
        pass


class Preemption:
    """A worker of which the second request has just been preempted by the first."""

    def __init__(self) -> None:
        self.state, self.limits = new_state(num_pages=16), new_limits(max_num_batched_tokens=64)
        self.recorder, self.costs = Recorder(), FixedCosts(0.01)
        ends: Any = self.recorder
        costs: Any = self.costs
        self.swap = Swap(self.state, ends, ends, costs=costs)
        for number in range(2):
            add(self.state, f"r{number}", prompt=60, arrival_s=float(number))
        plan = step(self.state, self.limits)[0]
        while not plan.preempted:
            plan = step(self.state, self.limits)[0]
        self.request = next(iter(self.state.view().waiting))


def test_pages_that_those_who_run_need_next_are_not_kept_for_a_copy() -> None:
    worker = Preemption()
    worker.swap.preempted(worker.request)
    (saved,) = worker.recorder.saved
    load = worker.state.load()
    assert len(saved.page_ids) == len(saved.run.keys) == load.num_free_pages - load.num_running > 0
    assert list(saved.run.keys) == worker.request.block_keys[: len(saved.run.keys)]


def test_a_load_begins_when_the_last_copy_is_down() -> None:
    worker = Preemption()
    worker.recorder.copying = True
    worker.swap.preempted(worker.request)
    worker.swap.settle()
    assert worker.recorder.loads == []
    worker.recorder.copying = False
    worker.swap.settle()
    worker.swap.settle()
    assert worker.recorder.loads == ["r1"]


def test_a_request_that_has_pages_again_or_is_gone_is_not_loaded() -> None:
    worker = Preemption()
    worker.recorder.copying = True
    worker.swap.preempted(worker.request)
    worker.swap.gone(worker.request.request_id)
    worker.recorder.copying = False
    worker.swap.settle()
    worker.swap.preempted(worker.request)
    worker.state.abort(RequestId("r0"), now_s=0.0)
    step(worker.state, worker.limits)
    worker.swap.settle()
    assert worker.recorder.loads == []


def test_where_copies_are_slower_than_computing_nothing_is_copied_or_loaded() -> None:
    worker = Preemption()
    worker.costs.s_per_token = 0.001 / 16
    worker.swap.preempted(worker.request)
    worker.swap.settle()
    assert worker.recorder.saved == worker.recorder.loads == []
