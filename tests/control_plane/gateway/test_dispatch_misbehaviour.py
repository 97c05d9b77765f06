"""Workers that break the protocol, and those who are silent."""

import asyncio

import pytest

from control_plane.errors import (
    GenerationFailed,
    GenerationTimeout,
)
from tests.control_plane.fake_cluster import Cluster, collect, make_generation
from tests.control_plane.fake_worker import FakeWorker
from tests.control_plane.gateway.generations import (
    LONG,
    PREFILL,
    assert_is_idle,
    assert_is_whole,
    first_chunk,
    rest,
)

# Workers that break the protocol, and those who are silent.


async def test_a_gap_in_the_numbers_fails_the_generation(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("d", max_answer_tokens=1))
    dispatcher = cluster.dispatcher()
    stream = dispatcher.generate(make_generation())
    await first_chunk(stream)
    worker.go_on(worker.submits[0], first=2, num_tokens=1)
    with pytest.raises(GenerationFailed, match="token 1 is missing before token 2"):
        await first_chunk(stream)
    await worker.until(lambda: len(worker.aborts) == 1)
    assert_is_idle(cluster, dispatcher)


async def test_repeated_numbers_are_dropped(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("d", max_answer_tokens=2))
    generation = make_generation(max_tokens=4)
    stream = cluster.dispatcher().generate(generation)
    chunks = [await first_chunk(stream)]
    worker.go_on(worker.submits[0], first=0, num_tokens=3)
    worker.go_on(worker.submits[0], first=1, num_tokens=3, finish=True)
    assert_is_whole(chunks + await rest(stream), generation)


async def test_a_worker_that_never_stops_is_stopped(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("d", max_answer_tokens=3))
    dispatcher = cluster.dispatcher()
    stream = dispatcher.generate(make_generation(max_tokens=4))
    await first_chunk(stream)
    worker.go_on(worker.submits[0], first=3, num_tokens=2)
    with pytest.raises(GenerationFailed, match="4 tokens were asked for"):
        await rest(stream)
    assert_is_idle(cluster, dispatcher)


async def test_a_worker_that_floods_a_slow_client_is_stopped(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("d", max_answer_tokens=1))
    dispatcher = cluster.dispatcher()
    stream = dispatcher.generate(make_generation(max_tokens=4))
    await first_chunk(stream)
    for _ in range(200):
        worker.go_on(worker.submits[0], first=0, num_tokens=1)
    other = make_generation(max_tokens=1)
    await collect(dispatcher, other)  # its answer comes after the flood, on the same session
    with pytest.raises(GenerationFailed, match="more than 68 messages"):
        await rest(stream)
    assert_is_idle(cluster, dispatcher)


async def test_silence_ends_at_the_deadline_and_aborts_everywhere(cluster: Cluster) -> None:
    decode = await cluster.start(FakeWorker("d", max_answer_tokens=0))
    prefill = await cluster.start(FakeWorker("p", role=PREFILL, max_answer_tokens=0))
    dispatcher = cluster.dispatcher(request_timeout_s=0.05)
    with pytest.raises(GenerationTimeout, match=r"for 0\.05 s"):
        await collect(dispatcher, make_generation(num_prompt_tokens=LONG))
    await decode.until(lambda: len(decode.aborts) == 1)
    await prefill.until(lambda: len(prefill.aborts) == 1)
    assert_is_idle(cluster, dispatcher)


async def test_every_token_moves_the_deadline(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("d", max_answer_tokens=0))
    timeout_s, num_tokens = 1.0, 6
    generation = make_generation(max_tokens=num_tokens)
    client = asyncio.create_task(collect(cluster.dispatcher(request_timeout_s=timeout_s), generation))
    await worker.until(lambda: len(worker.submits) == 1)
    loop, ticks = asyncio.get_running_loop(), asyncio.Event()
    started_s = loop.time()
    for number in range(num_tokens):  # in all longer than the deadline
        loop.call_at(started_s + timeout_s / 4 * (number + 1), ticks.set)
        await ticks.wait()
        ticks.clear()
        worker.go_on(worker.submits[0], first=number, num_tokens=1, finish=number == num_tokens - 1)
    assert_is_whole(await client, generation)
