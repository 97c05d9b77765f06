"""A worker that is drained: refuses what comes, finishes what it has, says so, and goes."""

import asyncio
import math
import signal
from typing import Any

import grpc
import pytest

from protos import worker_pb2, worker_pb2_grpc
from workers.config import Role
from workers.drain import Drain, Left
from workers.identity import Identity

Fixture = Any
PROMPT = list(range(3, 83))
ENDLESS = {"max_tokens": 400, "ignore_eos": True}


async def ask_to_drain(
    identity: Identity, *, timeout_s: float = 0.0, until_stopped: bool = False
) -> worker_pb2.DrainReply:
    async with grpc.aio.insecure_channel(identity.control_address) as channel:
        request = worker_pb2.DrainRequest(timeout_s=timeout_s, until_stopped=until_stopped)
        return await worker_pb2_grpc.WorkerStub(channel).Drain(request, timeout=10.0)


async def test_an_idle_worker_ends_at_once(start_worker: Fixture) -> None:
    running = await start_worker()
    assert (await ask_to_drain(running.identity)).num_requests == 0
    async with asyncio.timeout(10):
        await running.task
    assert running.drain.left.is_nothing


async def test_what_runs_goes_on_to_its_last_token_and_what_comes_is_refused(
    start_worker: Fixture, open_session: Fixture
) -> None:
    running = await start_worker()
    session = await open_session(running)
    answer = await session.submit("r", PROMPT, **ENDLESS)
    await answer.began.wait()
    assert (await ask_to_drain(running.identity)).num_requests == 1
    refused = await (await session.submit("late", PROMPT)).wait()
    assert refused.last.failure.code == worker_pb2.Failure.UNAVAILABLE
    assert "takes no new requests" in refused.last.failure.message
    await running.task
    # Nothing of what was said is lost, although the worker has gone.
    assert len((await answer.wait()).token_ids) == 400
    assert await session.status() is grpc.StatusCode.OK
    assert running.drain.left.is_nothing


async def test_a_lease_is_kept_until_its_puller_has_it(start_worker: Fixture, open_session: Fixture) -> None:
    prefill, decode = await start_worker(Role.PREFILL), await start_worker(Role.DECODE)
    at_prefill, at_decode = await open_session(prefill), await open_session(decode)
    held = await at_prefill.submit("r", PROMPT, purpose=worker_pb2.Submit.PREFILL_ONLY)
    await held.began.wait()
    await ask_to_drain(prefill.identity)
    answer = await at_decode.submit("r", PROMPT, kv_source=prefill.identity, max_tokens=6, ignore_eos=True)
    await answer.wait()
    assert "pull_done" in [event.name for event in answer.last.timeline]
    await prefill.task
    assert prefill.drain.left.is_nothing


async def test_the_puller_of_a_refused_prompt_learns_it_at_once(
    start_worker: Fixture, open_session: Fixture
) -> None:
    prefill, decode = await start_worker(Role.PREFILL), await start_worker(Role.DECODE)
    at_prefill, at_decode = await open_session(prefill), await open_session(decode)
    # It keeps the worker there.
    await (await at_prefill.submit("held", PROMPT, purpose=worker_pb2.Submit.PREFILL_ONLY)).began.wait()
    await ask_to_drain(prefill.identity)
    refused = await at_prefill.submit("r", PROMPT, purpose=worker_pb2.Submit.PREFILL_ONLY)
    answer = await at_decode.submit("r", PROMPT, kv_source=prefill.identity, max_tokens=6, ignore_eos=True)
    assert len((await answer.wait()).token_ids) == 6
    assert "pull_failed" in [event.name for event in answer.last.timeline]
    await refused.wait()


async def test_at_the_deadline_it_goes_and_knows_what_it_leaves(
    start_worker: Fixture, open_session: Fixture
) -> None:
    prefill = await start_worker(Role.PREFILL)
    session = await open_session(prefill)
    held = await session.submit("r", PROMPT, purpose=worker_pb2.Submit.PREFILL_ONLY)
    await held.began.wait()
    await ask_to_drain(prefill.identity)
    await ask_to_drain(prefill.identity, timeout_s=0.01)  # a shorter deadline counts
    async with asyncio.timeout(10):
        await prefill.task
    assert prefill.drain.left == Left(num_requests=0, num_leases=1, num_pages=5, request_ids=("r",))


async def test_who_waits_for_its_end_is_told_what_it_leaves(
    start_worker: Fixture, open_session: Fixture
) -> None:
    prefill, idle = await start_worker(Role.PREFILL), await start_worker()
    session = await open_session(prefill)
    held = await session.submit("r", PROMPT, purpose=worker_pb2.Submit.PREFILL_ONLY)
    await held.began.wait()
    left = await ask_to_drain(prefill.identity, timeout_s=0.01, until_stopped=True)
    assert (left.num_requests, left.num_leases, left.num_pages, left.request_ids) == (0, 1, 5, ["r"])
    assert await ask_to_drain(idle.identity, until_stopped=True) == worker_pb2.DrainReply()


def test_blocks_that_were_offered_once_more_are_no_loss() -> None:
    assert Left(num_extra_blocks=1).is_nothing
    assert not Left(num_blocks=1, num_extra_blocks=1).is_nothing


@pytest.mark.parametrize("timeout_s", [-1.0, math.inf, math.nan])
async def test_a_deadline_that_is_none_is_refused(start_worker: Fixture, timeout_s: float) -> None:
    running = await start_worker()
    with pytest.raises(grpc.aio.AioRpcError, match="timeout_s must be a number of seconds") as refusal:
        await ask_to_drain(running.identity, timeout_s=timeout_s)
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not running.drain.is_draining


async def test_work_without_end_is_cancelled_at_the_deadline_even_if_that_comes_to_be_sooner() -> None:
    drain = Drain(timeout_s=3600.0)
    drain.begin()
    finishing = asyncio.create_task(drain.finish(asyncio.Event().wait()))
    await asyncio.sleep(0)
    drain.begin(0.0)
    async with asyncio.timeout(10):
        await finishing


async def test_a_signal_lets_it_finish_and_a_second_one_does_not(
    start_process: Fixture, connect: Fixture
) -> None:
    worker = await start_process(role="prefill")
    session = connect(await worker.ready())
    await session.open()
    session.listen()
    held = await session.submit("r", PROMPT, purpose=worker_pb2.Submit.PREFILL_ONLY)
    await held.began.wait()
    worker.process.send_signal(signal.SIGTERM)
    assert (await worker.event("draining"))["num_leases"] == 1
    worker.process.send_signal(signal.SIGTERM)
    stopped = await worker.event("stopped")
    assert (stopped["num_leases"], stopped["request_ids"]) == (1, ["r"])
    assert await worker.ended() == 3
