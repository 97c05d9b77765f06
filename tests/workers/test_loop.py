import asyncio
import random
from typing import Any

import psutil
import pytest

from protos import worker_pb2
from workers import steps
from workers.config import Role
from workers.errors import EngineFailed

Fixture = Any
# 150 tokens: ten blocks, the last one partly filled, in three chunks.
LONG_PROMPT = [(7 * i) % 250 + 3 for i in range(150)]
GREEDY = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 1234, "max_tokens": 24, "ignore_eos": True}
PENALIZED = {
    "temperature": 0.7, "seed": 5, "max_tokens": 24, "ignore_eos": True, "repetition_penalty": 1.3,
    "presence_penalty": 0.4, "frequency_penalty": 0.2, "num_logprobs": 3,
}  # fmt: skip


class Pair:
    """A prefill worker, a decode worker, and a session with each: what a dispatcher does, by hand."""

    def __init__(self, prefill: Any, decode: Any, sessions: tuple[Any, Any]) -> None:
        self.prefill, self.decode = prefill, decode
        self.to_prefill, self.to_decode = sessions

    async def submit(self, request_id: str, prompt: list[int], **fields: Any) -> tuple[Any, Any]:
        source = await self.to_prefill.submit(
            request_id, prompt, purpose=worker_pb2.Submit.PREFILL_ONLY, **fields
        )
        target = await self.to_decode.submit(request_id, prompt, kv_source=self.prefill.identity, **fields)
        return source, target

    async def settled(self) -> None:
        await self.prefill.settled()
        await self.decode.settled()


@pytest.fixture
async def pair(start_worker: Fixture, open_session: Fixture) -> Pair:
    prefill, decode = await start_worker(Role.PREFILL), await start_worker(Role.DECODE)
    return Pair(prefill, decode, (await open_session(prefill), await open_session(decode)))


@pytest.fixture
async def alone(start_worker: Fixture, open_session: Fixture) -> Any:
    """A session with a mixed worker, whose answers are the truth."""
    return await open_session(await start_worker(Role.MIXED))


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALIZED], ids=["greedy", "seeded", "penalized"])
@pytest.mark.parametrize("num_prompt_tokens", [1, 16, 33, 150])
async def test_two_workers_answer_as_one_does(
    pair: Pair, alone: Fixture, sampling: dict[str, Any], num_prompt_tokens: int
) -> None:
    prompt = LONG_PROMPT[:num_prompt_tokens]
    expected = await (await alone.submit("r", prompt, **sampling)).wait()
    source, target = await pair.submit("r", prompt, **sampling)
    await target.wait()
    assert target.token_ids == expected.token_ids
    assert target.finish_reason == expected.finish_reason == "length"
    assert [p.top_token_ids for p in target.logprobs] == [p.top_token_ids for p in expected.logprobs]
    for ours, theirs in zip(target.logprobs, expected.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    await source.wait()
    assert source.token_ids == expected.token_ids[:1]
    assert source.finish_reason == "handed_over"
    names = [event.name for event in target.last.timeline]
    assert names.index("pull_started") < names.index("pull_done") < names.index("finished")
    await pair.settled()


async def test_the_timeline_of_a_handed_over_request_tells_what_both_workers_did(pair: Pair) -> None:
    _, target = await pair.submit("r", LONG_PROMPT, **GREEDY)
    await target.wait()
    at = {event.name: event.unix_s for event in target.last.timeline}
    assert len(at) == len(target.last.timeline)
    there = ["queued", "scheduled", "first_chunk", "prefill_done", "first_token"]
    assert [name for name in at if name.startswith("prefill.")] == [f"prefill.{name}" for name in there]
    here = ["received", "queued", "scheduled", "pull_started", "pull_done", "prefill_done", "first_token"]
    assert [name for name in at if not name.startswith("prefill.")] == [*here, "finished"]
    assert at["prefill.prefill_done"] <= at["pull_done"]  # one host, one clock
    await pair.settled()


async def test_many_hand_overs_at_a_time_answer_as_one_worker_does(pair: Pair, alone: Fixture) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(3, 250) for _ in range(rng.randrange(1, 100))] for _ in range(24)]
    handed = [await pair.submit(f"r{i}", prompt, **SEEDED) for i, prompt in enumerate(prompts)]
    expected = [await alone.submit(f"r{i}", prompt, **SEEDED) for i, prompt in enumerate(prompts)]
    for (_, target), truth in zip(handed, expected, strict=True):
        assert (await target.wait()).token_ids == (await truth.wait()).token_ids
        assert "pull_done" in [event.name for event in target.last.timeline]
    await pair.settled()


async def test_a_request_that_ends_with_its_first_token_is_handed_over_as_ended(pair: Pair) -> None:
    source, target = await pair.submit("r", LONG_PROMPT, **(GREEDY | {"max_tokens": 1}))
    await target.wait()
    assert len(target.token_ids) == 1
    assert target.finish_reason == "length"
    assert (await source.wait()).token_ids == target.token_ids
    await pair.settled()


async def test_blocks_that_the_decode_worker_has_are_not_pulled_again(pair: Pair) -> None:
    first = await (await pair.submit("r1", LONG_PROMPT, **GREEDY))[1].wait()
    pulled_once = pair.decode.worker.metrics.registry.get_sample_value(
        "penstock_pulled_bytes_total", {"model_name": "tiny"}
    )
    second = await (await pair.submit("r2", LONG_PROMPT, **GREEDY))[1].wait()
    pulled_twice = pair.decode.worker.metrics.registry.get_sample_value(
        "penstock_pulled_bytes_total", {"model_name": "tiny"}
    )
    assert second.token_ids == first.token_ids
    assert second.last.num_cached_tokens >= 144
    assert pulled_twice - pulled_once == pulled_once / 10  # the last of ten blocks


async def test_a_decode_worker_whose_source_is_gone_computes_the_prompt_itself(
    pair: Pair, alone: Fixture
) -> None:
    expected = await (await alone.submit("r", LONG_PROMPT, **SEEDED)).wait()
    await pair.prefill.end()
    target = await pair.to_decode.submit("r", LONG_PROMPT, kv_source=pair.prefill.identity, **SEEDED)
    assert (await target.wait()).token_ids == expected.token_ids
    assert "pull_failed" in [event.name for event in target.last.timeline]
    await pair.decode.settled()


async def test_a_decode_worker_computes_itself_what_its_source_never_got(pair: Pair, alone: Fixture) -> None:
    expected = await (await alone.submit("r", LONG_PROMPT, **GREEDY)).wait()
    target = await pair.to_decode.submit("r", LONG_PROMPT, kv_source=pair.prefill.identity, **GREEDY)
    assert (await target.wait()).token_ids == expected.token_ids


async def test_a_first_token_that_ends_the_text_is_told_by_the_decode_worker_alone(
    pair: Pair, alone: Fixture
) -> None:
    [first, *_] = (await (await alone.submit("r", LONG_PROMPT, **GREEDY)).wait()).token_ids
    source, target = await pair.submit("r", LONG_PROMPT, **(GREEDY | {"stop_token_ids": [first]}))
    await target.wait()
    assert (target.token_ids, target.finish_reason) == ([first], "stop")
    await source.wait()
    assert (source.token_ids, source.finish_reason) == ([], "handed_over")
    await pair.settled()


async def test_a_lease_that_nobody_takes_up_ends_and_frees_its_pages(
    start_worker: Fixture, open_session: Fixture
) -> None:
    running = await start_worker(Role.PREFILL, lease_s=0.1)
    session = await open_session(running)
    answer = await session.submit("r", LONG_PROMPT, purpose=worker_pb2.Submit.PREFILL_ONLY, **GREEDY)
    assert (await answer.wait()).finish_reason == "abort"
    assert len(answer.token_ids) == 1
    await running.settled()


async def test_an_abort_while_pulling_leaves_nothing_behind(pair: Pair) -> None:
    # The source never gets this request, so the pull waits for it.
    target = await pair.to_decode.submit("r", LONG_PROMPT, kv_source=pair.prefill.identity, **GREEDY)
    await pair.to_decode.abort("r")
    assert (await target.wait()).finish_reason == "abort"
    await pair.decode.settled()


async def test_an_aborted_request_says_so_and_frees_its_pages(alone: Fixture, start_worker: Fixture) -> None:
    answer = await alone.submit("r", LONG_PROMPT, **(GREEDY | {"max_tokens": 300}))
    await answer.began.wait()
    await alone.abort("r")
    assert (await answer.wait()).finish_reason == "abort"
    assert len(answer.token_ids) < 300
    again = await alone.submit("r", LONG_PROMPT, **GREEDY)
    assert (await again.wait()).finish_reason == "length"


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALIZED], ids=["greedy", "seeded", "penalized"])
async def test_a_request_goes_on_where_another_worker_stopped(
    alone: Fixture, sampling: dict[str, Any]
) -> None:
    whole = await (await alone.submit("whole", LONG_PROMPT, **sampling)).wait()
    rest = await alone.submit("rest", LONG_PROMPT, output_token_ids=whole.token_ids[:10], **sampling)
    await rest.wait()
    assert rest.first_token_number == 10
    assert rest.token_ids == whole.token_ids[10:]


async def test_everything_that_ends_in_a_step_comes_in_one_event(
    start_worker: Fixture, open_session: Fixture
) -> None:
    session = await open_session(await start_worker())
    answers = [await session.submit(f"r{i}", [5, 6, 7], **GREEDY) for i in range(8)]
    for answer in answers:
        await answer.wait()
    assert session.num_steps < 8 * 24 / 2


async def test_a_step_that_raises_fails_its_requests_and_the_worker_goes_on(
    start_worker: Fixture, open_session: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start_worker()
    session = await open_session(running)
    execute = running.engine.execute

    def break_once(*arguments: Any, **keywords: Any) -> Any:
        monkeypatch.setattr(running.engine, "execute", execute)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(running.engine, "execute", break_once)
    failed = await (await session.submit("r1", LONG_PROMPT, **GREEDY)).wait()
    assert failed.last.failure.code == worker_pb2.Failure.INTERNAL
    assert "out of luck" in failed.last.failure.message
    await running.settled()
    assert len((await (await session.submit("r2", LONG_PROMPT, **GREEDY)).wait()).token_ids) == 24


async def test_an_engine_that_fails_step_after_step_ends_the_worker(
    start_worker: Fixture, open_session: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start_worker()
    session = await open_session(running)

    def break_always(*arguments: Any, **keywords: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(running.engine, "execute", break_always)
    for number in range(steps.MAX_FAILED_STEPS):
        answer = await session.submit(f"r{number}", LONG_PROMPT, **GREEDY)
        if number < steps.MAX_FAILED_STEPS - 1:
            await answer.wait()
    with pytest.raises(EngineFailed, match="3 steps in a row"):
        async with asyncio.timeout(30):
            await running.task


def _data_connections(running: Any) -> list[Any]:
    port = int(running.identity.data_address.rpartition(":")[2])
    connections = psutil.Process().net_connections("tcp")
    return [
        c for c in connections if c.status != psutil.CONN_LISTEN and port in (c.laddr.port, *(c.raddr[1:]))
    ]


async def test_a_storm_of_submits_aborts_and_broken_sessions_leaves_nothing_behind(
    pair: Pair, open_session: Fixture, start_worker: Fixture
) -> None:
    rng = random.Random(11)
    answers: list[Any] = []

    async def client(number: int) -> None:
        """A gateway: sessions with both workers, requests, aborts, and then it is gone."""
        theirs = Pair(
            pair.prefill, pair.decode, (await open_session(pair.prefill), await open_session(pair.decode))
        )
        for turn in range(25):
            prompt = [rng.randrange(3, 250) for _ in range(rng.randrange(1, 120))]
            request_id = f"{number}/{turn}"
            fields = SEEDED | {"max_tokens": rng.randrange(1, 30), "seed": turn}
            if rng.random() < 0.6:
                ours = await theirs.submit(request_id, prompt, **fields)
            else:
                ours = (await theirs.to_decode.submit(request_id, prompt, **fields),)
            answers.extend(ours)
            match rng.randrange(4):
                case 0:
                    await theirs.to_decode.abort(request_id)
                    await theirs.to_prefill.abort(request_id)
                case 1:
                    await ours[0].wait()
                    await theirs.to_prefill.abort(request_id)
                case 2:
                    await asyncio.sleep(0)
        await theirs.to_prefill.close()
        await theirs.to_decode.close()

    async with asyncio.timeout(100), asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(client(number))
    await pair.settled()
    assert any(answer.ended.is_set() and answer.finish_reason == "length" for answer in answers)
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("pull ")]
    async with asyncio.timeout(10):
        while any(map(_data_connections, (pair.prefill, pair.decode))):  # noqa: ASYNC110
            await asyncio.sleep(0)  # the handlers see that their peer has gone
    for number in range(3):
        _, target = await pair.submit(f"after{number}", LONG_PROMPT, **GREEDY)
        assert len((await target.wait()).token_ids) == 24
    await pair.settled()
