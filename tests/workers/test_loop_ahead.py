"""A worker whose engine can launch a step before the one before it is over: a device's, which is the CPU here."""

import asyncio
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from protos import worker_pb2
from workers.engine.engine import LaunchedStep
from workers.step import StepPlan

Fixture = Any
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
PROMPTS = [[(number * i) % 250 + 3 for i in range(length)] for number, length in ((3, 5), (7, 20), (11, 33))]
Launch = Callable[..., LaunchedStep]


@pytest.fixture
async def ahead(start_worker: Fixture) -> Any:
    return await start_worker(attention="reference")


@pytest.fixture
def plans_ahead(ahead: Any, monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """Of the steps that were launched before what they compute was known."""
    plans: list[StepPlan] = []
    launch: Launch = ahead.engine.launch

    def watched(plan: StepPlan, **keywords: Any) -> LaunchedStep:
        if any(row.num_computed_tokens > row.request.num_computed_tokens for row in plan.rows):
            plans.append(plan)
        return launch(plan, **keywords)

    monkeypatch.setattr(ahead.engine, "launch", watched)
    return plans


async def all_answers(session: Any, **sampling: Any) -> list[list[int]]:
    answers = [
        await session.submit(f"r{number}", prompt, **(GREEDY | sampling | {"seed": number}))
        for number, prompt in enumerate(PROMPTS)
    ]
    return [(await answer.wait()).token_ids for answer in answers]


@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "seeded"])
async def test_answers_are_those_of_a_worker_that_takes_one_step_at_a_time(
    ahead: Any, plans_ahead: list[StepPlan], start_worker: Fixture, open_session: Fixture, temperature: float
) -> None:
    expected = await all_answers(await open_session(await start_worker()), temperature=temperature)
    assert await all_answers(await open_session(ahead), temperature=temperature) == expected
    assert len(plans_ahead) > 20
    await ahead.settled()


async def test_long_prompts_are_computed_chunk_after_chunk_ahead_beside_those_who_decode(
    ahead: Any, plans_ahead: list[StepPlan], start_worker: Fixture, open_session: Fixture
) -> None:
    long = [7 * i % 250 + 3 for i in range(230)]
    found = []
    for worker in (await start_worker(), ahead):
        session = await open_session(worker)
        answers = [await session.submit(name, p, **GREEDY) for name, p in (("s", PROMPTS[0]), ("l", long))]
        found.append([(await answer.wait()).token_ids for answer in answers])
    assert found[0] == found[1]
    assert any(row.num_new_tokens > 1 for plan in plans_ahead for row in plan.rows)
    await ahead.settled()


async def test_one_that_ends_with_a_token_of_its_own_choice_says_nothing_after_it(
    ahead: Any, plans_ahead: list[StepPlan], open_session: Fixture
) -> None:
    session = await open_session(ahead)
    whole = await all_answers(session)
    last = whole[1][20]
    stopped = await all_answers(session, stop_token_ids=[last])
    assert stopped == [answer[: answer.index(last) + 1] if last in answer else answer for answer in whole]
    await ahead.settled()  # and its pages are free again
    assert any(
        row.request.request_id == "r1" and row.num_sampled_before == len(stopped[1])
        for plan in plans_ahead
        for row in plan.rows
    ), "it had no row in vain"


async def test_what_needs_its_last_token_to_go_on_is_computed_one_step_at_a_time(
    ahead: Any, plans_ahead: list[StepPlan], start_worker: Fixture, open_session: Fixture
) -> None:
    asked = {"repetition_penalty": 1.3, "num_logprobs": 2}
    expected = await all_answers(await open_session(await start_worker()), **asked)
    assert await all_answers(await open_session(ahead), **asked) == expected
    assert plans_ahead == []


@pytest.mark.parametrize("which", ["launched", "read"])
async def test_a_step_that_fails_takes_the_one_launched_after_it_along_and_the_worker_goes_on(
    ahead: Any, open_session: Fixture, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    session = await open_session(ahead)
    launch: Launch = ahead.engine.launch
    num_launched = 0

    def unlucky(*arguments: Any) -> Any:
        raise RuntimeError("out of luck")

    def tenth_breaks(plan: StepPlan, **keywords: Any) -> LaunchedStep:
        nonlocal num_launched
        num_launched += 1
        if num_launched == 10 and which == "launched":
            unlucky()
        launched = launch(plan, **keywords)
        if num_launched == 10:
            monkeypatch.setattr(launched, "result", unlucky)
        return launched

    monkeypatch.setattr(ahead.engine, "launch", tenth_breaks)
    failed = await (await session.submit("r", PROMPTS[0], **GREEDY)).wait()
    assert failed.last.failure.code == worker_pb2.Failure.INTERNAL
    assert "step 10 failed: RuntimeError: out of luck" in failed.last.failure.message
    await ahead.settled()
    assert [len(answer) for answer in await all_answers(session)] == [40, 40, 40]
    await ahead.settled()


async def test_outputs_carry_the_number_of_the_step_that_computed_them(
    ahead: Any, plans_ahead: list[StepPlan], connect: Fixture
) -> None:
    session = connect(ahead.identity)
    await session.open()
    answer = await session.submit("r", PROMPTS[0], **(GREEDY | {"max_tokens": 5}))
    numbers = []
    while not answer.ended.is_set():
        event = await session.call.read()
        numbers.append(event.step.number)
        for output in event.step.outputs:
            answer.take(output)
    assert numbers == [1, 2, 3, 4, 5]
    assert plans_ahead


async def test_one_that_stands_still_for_its_puller_says_nothing_beyond_what_is_handed_over(
    ahead: Any, open_session: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    event_loop, launch, loop = asyncio.get_running_loop(), ahead.engine.launch, ahead.worker.loop
    num_launched = 0

    def moves_beside_the_fourth(plan: StepPlan, **keywords: Any) -> LaunchedStep:
        nonlocal num_launched
        num_launched += 1
        if num_launched == 4:  # two steps are under way, and the puller has no page for more than they give
            event_loop.call_soon_threadsafe(partial(loop.open_move, "r", num_pages=1))
        launched: LaunchedStep = launch(plan, **keywords)
        return launched

    monkeypatch.setattr(ahead.engine, "launch", moves_beside_the_fourth)
    answer = await (await open_session(ahead)).submit("r", PROMPTS[0], **(GREEDY | {"max_tokens": 10}))
    async with asyncio.timeout(20.0):
        while not any(progress.handoff for progress in ahead.worker.state.export_progress()):  # noqa: ASYNC110
            await asyncio.sleep(0)
    (progress,) = ahead.worker.state.export_progress()
    loop.lease_ended("r", released=True)
    await answer.wait()
    assert answer.finish_reason == "handed_over"
    assert answer.token_ids == list(progress.handoff.output_token_ids)
    await ahead.settled()


async def test_a_storm_of_requests_that_come_end_and_are_aborted_leaves_nothing_behind(
    ahead: Any, plans_ahead: list[StepPlan], open_session: Fixture
) -> None:
    rng = random.Random(3)

    async def client(number: int) -> None:
        session = await open_session(ahead)
        for turn in range(8):
            name, prompt = (
                f"{number}/{turn}",
                [rng.randrange(3, 250) for _ in range(rng.choice([5, 40, 150]))],
            )
            stop = [rng.randrange(250) for _ in range(10)]
            asked = GREEDY | {"max_tokens": rng.randrange(1, 60), "stop_token_ids": stop}
            answer = await session.submit(name, prompt, **asked)
            if rng.random() < 0.3:
                await session.abort(name)
            await answer.wait()

    async with asyncio.timeout(60), asyncio.TaskGroup() as clients:
        for number in range(6):
            clients.create_task(client(number))
    await ahead.settled()
    assert plans_ahead
