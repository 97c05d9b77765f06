"""Workers that stop in order, and requests that wait for the next when the last one is gone."""

import asyncio

import pytest

from control_plane.errors import (
    NoWorkers,
    QueueFull,
)
from protos import worker_pb2
from tests.control_plane.fake_cluster import Cluster, collect, make_generation
from tests.control_plane.fake_worker import WAIT_S, FakeWorker
from tests.control_plane.gateway.generations import (
    PREFILL,
    assert_is_idle,
    assert_is_whole,
    first_chunk,
    rest,
)

# Workers that stop in order.


async def test_a_worker_that_drains_gets_no_new_requests_and_finishes_what_it_has(cluster: Cluster) -> None:
    leaving = await cluster.start(FakeWorker("a-leaving", max_answer_tokens=1))
    generation = make_generation()
    dispatcher = cluster.dispatcher()
    stream = dispatcher.generate(generation)
    chunks = [await first_chunk(stream)]
    await cluster.start(FakeWorker("heir"))
    leaving.description.is_draining = True
    cluster.join(leaving)
    for _ in range(3):
        other = make_generation(num_prompt_tokens=9)
        assert_is_whole(await collect(dispatcher, other), other)
    assert len(leaving.submits) == 1
    leaving.go_on(leaving.submits[0], first=1, num_tokens=3, finish=True)
    assert_is_whole(chunks + await rest(stream), generation)


async def test_refusals_of_workers_that_stop_are_no_failures(cluster: Cluster) -> None:
    for number in range(4):
        leaving = await cluster.start(FakeWorker(f"a-{number}"))
        leaving.refusal = worker_pb2.Failure(code=worker_pb2.Failure.UNAVAILABLE, message="it stops")
    await cluster.start(FakeWorker("heir"))
    generation = make_generation()
    assert_is_whole(await collect(cluster.dispatcher(max_retries=0), generation), generation)


async def test_what_a_worker_leaves_when_it_stops_is_neither_retry_nor_poison(cluster: Cluster) -> None:
    generation = make_generation()
    dispatcher = cluster.dispatcher(max_retries=0, worker_wait_s=WAIT_S)
    client = asyncio.create_task(collect(dispatcher, generation))
    await cluster.start(FakeWorker("idle", role=PREFILL))
    for epoch in (1, 2, 3):
        leaving = await cluster.start(FakeWorker("d", epoch=epoch, max_answer_tokens=0))
        if epoch == 1:
            client.cancel()
            client = asyncio.create_task(collect(dispatcher, generation))
        await leaving.until(lambda leaving=leaving: len(leaving.submits) == 1)
        leaving.description.is_draining = True
        cluster.join(leaving)
        await leaving.stop()
    await cluster.start(FakeWorker("d", epoch=4))
    assert_is_whole(await client, generation)


# The last worker is gone.


async def test_a_request_waits_for_the_only_worker_to_come_back(cluster: Cluster) -> None:
    doomed = await cluster.start(FakeWorker("d", max_answer_tokens=2))
    generation = make_generation()
    dispatcher = cluster.dispatcher(worker_wait_s=WAIT_S)
    stream = dispatcher.generate(generation)
    chunks = [await first_chunk(stream)]
    waiting = asyncio.create_task(rest(stream))
    await doomed.stop()
    await cluster.until(lambda: not cluster.is_ready(doomed))
    cluster.leave(doomed)
    # One that comes meanwhile waits as well.
    late = asyncio.create_task(collect(dispatcher, generation))
    heir = await cluster.start(FakeWorker("d", epoch=2))
    assert_is_whole(chunks + await waiting, generation)
    assert_is_whole(await late, generation)
    assert len(heir.submits) == 2
    assert_is_idle(cluster, dispatcher)


async def test_a_request_that_has_tokens_waits_where_a_new_one_is_told_that_all_are_full(
    cluster: Cluster,
) -> None:
    doomed = await cluster.start(FakeWorker("a", max_answer_tokens=2))
    generation = make_generation()
    dispatcher = cluster.dispatcher(worker_wait_s=WAIT_S)
    stream = dispatcher.generate(generation)
    chunks = [await first_chunk(stream)]
    full = await cluster.start(FakeWorker("b"))
    full.refusal = worker_pb2.Failure(code=worker_pb2.Failure.OVERLOADED, retry_after_s=7.0)
    waiting = asyncio.create_task(rest(stream))
    await doomed.stop()
    await full.until(lambda: len(full.submits) == 1)
    cluster.leave(doomed)
    with pytest.raises(QueueFull):
        await collect(dispatcher, make_generation(request_id="new"))
    assert not waiting.done()
    await cluster.start(FakeWorker("a", epoch=2))
    assert_is_whole(chunks + await waiting, generation)
    assert_is_idle(cluster, dispatcher)


async def test_a_worker_whose_session_broke_is_used_again(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("d", max_answer_tokens=1))
    generation = make_generation(max_tokens=2)
    stream = cluster.dispatcher(worker_wait_s=WAIT_S).generate(generation)
    chunks = [await first_chunk(stream)]
    worker.break_sessions()
    assert_is_whole(chunks + await rest(stream), generation)
    assert len(worker.submits) == 2


async def test_a_model_whose_workers_are_gone_is_served_until_they_have_been_away_too_long(
    cluster: Cluster,
) -> None:
    worker = await cluster.start(FakeWorker("d"))
    waits, does_not = cluster.dispatcher(worker_wait_s=WAIT_S), cluster.dispatcher()
    cluster.leave(worker)
    assert [model.name for model in waits.models()] == ["fake"]
    assert not waits.ready()
    assert does_not.models() == []
    with pytest.raises(NoWorkers):
        await collect(does_not, make_generation())


async def test_while_the_only_worker_drains_requests_wait_for_the_next(cluster: Cluster) -> None:
    leaving = await cluster.start(FakeWorker("d"))
    leaving.description.is_draining = True
    cluster.join(leaving)
    generation = make_generation()
    client = asyncio.create_task(collect(cluster.dispatcher(worker_wait_s=WAIT_S), generation))
    with pytest.raises(NoWorkers, match="is draining"):
        await collect(cluster.dispatcher(), make_generation())
    await cluster.start(FakeWorker("e"))
    assert_is_whole(await client, generation)
    assert leaving.submits == []


async def test_a_gateway_that_stops_lets_nobody_wait_for_workers(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("d", max_answer_tokens=0))
    client = asyncio.create_task(collect(cluster.dispatcher(worker_wait_s=3600.0), make_generation()))
    await worker.until(lambda: len(worker.submits) == 1)
    await cluster.sessions.close()
    with pytest.raises(NoWorkers):
        await client
