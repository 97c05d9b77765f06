"""Who gets a generation, what he is told of it, and what comes of it where nothing goes wrong."""

import asyncio
import math
import random

import pytest

from control_plane.directory.block_events import BlockEvents
from control_plane.directory.member import WorkerLoad
from control_plane.errors import (
    GenerationFailed,
    GenerationTimeout,
    NoWorkers,
    QueueFull,
)
from control_plane.gateway.backend import Dispatcher, ServedModel
from control_plane.gateway.sessions import SessionClosed
from control_plane.generation import Generation, WorkerEvent
from kvstore.blocks import chain_keys, root_key
from protos import worker_pb2
from tests.control_plane.fake_cluster import Cluster, collect, make_generation
from tests.control_plane.fake_worker import WAIT_S, FakeWorker, expected_tokens
from tests.control_plane.gateway.generations import (
    LONG,
    MIXED,
    PREFILL,
    assert_is_idle,
    assert_is_whole,
    first_chunk,
    rest,
    tokens_of,
)

# One worker, nothing goes wrong.


async def test_a_generation_on_one_worker_yields_every_token_and_the_end(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("d"))
    dispatcher: Dispatcher = cluster.dispatcher()
    generation = make_generation(max_tokens=5)
    assert_is_whole(await rest(dispatcher.generate(generation)), generation)
    assert worker.aborts == []


async def test_a_short_prompt_goes_to_the_decode_worker_alone(cluster: Cluster) -> None:
    decode = await cluster.start(FakeWorker("d"))
    prefill = await cluster.start(FakeWorker("p", role=PREFILL))
    await collect(cluster.dispatcher(), make_generation(num_prompt_tokens=63))
    assert prefill.submits == []
    assert not decode.submits[0].HasField("kv_source")


async def test_a_long_prompt_goes_to_both_under_one_id(cluster: Cluster) -> None:
    decode = await cluster.start(FakeWorker("d"))
    prefill = await cluster.start(FakeWorker("p", role=PREFILL, epoch=77))
    generation = make_generation(num_prompt_tokens=LONG)
    assert_is_whole(await collect(cluster.dispatcher(), generation), generation)
    (at_prefill,), (at_decode,) = prefill.submits, decode.submits
    assert at_prefill.purpose == worker_pb2.Submit.PREFILL_ONLY
    assert at_decode.purpose == worker_pb2.Submit.GENERATE
    source = at_decode.kv_source
    assert (source.worker_id, source.epoch, source.request_id) == ("p", 77, at_prefill.request_id)
    assert source.control_address == prefill.description.control_address
    assert at_decode.request_id == at_prefill.request_id


async def test_the_events_of_a_worker_come_with_its_tokens(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("d", max_answer_tokens=0))
    stream = cluster.dispatcher().generate(make_generation(max_tokens=1))
    chunks = asyncio.create_task(rest(stream))
    await worker.until(lambda: bool(worker.submits))
    times = {"queued": 1.5, "scheduled": math.nan, "finished": 2.5}
    timeline = [worker_pb2.TimelineEvent(name=name, unix_s=unix_s) for name, unix_s in times.items()]
    length = worker_pb2.FINISH_LENGTH
    worker.output(worker.submits[0].request_id, [9], first=0, finish_reason=length, timeline=timeline)
    # A time that is no number is left out.
    (chunk,) = await chunks
    assert chunk.events == (WorkerEvent("queued", 1.5), WorkerEvent("finished", 2.5))


async def test_a_prompt_that_is_cached_where_it_decodes_is_not_handed_over(cluster: Cluster) -> None:
    cold = await cluster.start(FakeWorker("a-cold"))
    warm = await cluster.start(FakeWorker("warm"))
    prefill = await cluster.start(FakeWorker("p", role=PREFILL))
    generation = make_generation(num_prompt_tokens=LONG, cache_salt="tenant")
    root = root_key(model_fingerprint=warm.description.model.fingerprint, cache_salt="tenant")
    stored = b"".join(chain_keys(root, generation.prompt_token_ids))
    blocks = BlockEvents(sequence=1, stored=stored)
    load = WorkerLoad(num_pages=1024, num_free_pages=1024)
    cluster.directory.heartbeat(warm.member.incarnation, load=load, blocks=blocks, now_s=0.0)
    await collect(cluster.dispatcher(), generation)
    assert (len(cold.submits), len(warm.submits), len(prefill.submits)) == (0, 1, 0)
    # Another tenant shares no blocks.
    await collect(cluster.dispatcher(), make_generation(num_prompt_tokens=LONG, cache_salt="other"))
    assert len(prefill.submits) == 1


def hold(cluster: Cluster, worker: FakeWorker, generation: Generation, *, num_blocks: int) -> None:
    root = root_key(model_fingerprint=worker.description.model.fingerprint)
    stored = b"".join(list(chain_keys(root, generation.prompt_token_ids))[:num_blocks])
    events = BlockEvents(sequence=1, snapshot=True, stored=stored)
    cluster.directory.heartbeat(worker.member.incarnation, load=worker.member.load, blocks=events, now_s=0.0)


async def test_who_computes_the_prompt_is_told_who_holds_more_of_it(cluster: Cluster) -> None:
    decode = await cluster.start(FakeWorker("d"))
    prefill = await cluster.start(FakeWorker("p", role=PREFILL))
    store = FakeWorker("s", role=worker_pb2.ROLE_STORE, epoch=4)
    store.description.control_address = "127.0.0.1:9"
    cluster.join(store)
    generation = make_generation(num_prompt_tokens=LONG)
    hold(cluster, prefill, generation, num_blocks=3)
    hold(cluster, decode, generation, num_blocks=2)
    hold(cluster, store, generation, num_blocks=8)
    await collect(cluster.dispatcher(), generation)
    ((holder,),) = [submit.kv_holders for submit in prefill.submits]
    assert (holder.worker_id, holder.epoch, holder.num_blocks) == ("s", 4, 8)
    assert holder.control_address == "127.0.0.1:9"
    assert list(decode.submits[0].kv_holders) == []
    await collect(cluster.dispatcher(prefill_threshold_tokens=1000), generation)
    assert [(each.worker_id, each.num_blocks) for each in decode.submits[1].kv_holders] == [
        ("s", 8),
        ("p", 3),
    ]


async def test_only_what_is_not_cached_there_counts_as_work_of_who_computes(cluster: Cluster) -> None:
    decode = await cluster.start(FakeWorker("d", max_answer_tokens=0))
    prefill = await cluster.start(FakeWorker("p", role=PREFILL, max_answer_tokens=0))
    generation = make_generation(num_prompt_tokens=LONG)
    hold(cluster, prefill, generation, num_blocks=5)
    client = asyncio.create_task(collect(cluster.dispatcher(), generation))
    await decode.until(lambda: bool(decode.submits))
    assert unreported_tokens(cluster, decode, prefill) == [0, LONG - 5 * 16]
    client.cancel()


async def test_without_a_session_the_prefill_worker_is_counted_no_work(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = await cluster.start(FakeWorker("d", max_answer_tokens=0))
    prefill = await cluster.start(FakeWorker("p", role=PREFILL))
    generation = make_generation(num_prompt_tokens=LONG)
    hold(cluster, decode, generation, num_blocks=2)
    session = cluster.sessions.get(prefill.member.incarnation)
    assert session is not None

    def refuse(*_: object, **__: object) -> None:
        raise SessionClosed("just gone")

    monkeypatch.setattr(session, "submit", refuse)
    client = asyncio.create_task(collect(cluster.dispatcher(), generation))
    await decode.until(lambda: bool(decode.submits))
    assert unreported_tokens(cluster, decode, prefill) == [LONG, 0]
    assert not decode.submits[0].HasField("kv_source")
    assert list(decode.submits[0].kv_holders) == []  # it holds those itself
    client.cancel()


def unreported_tokens(cluster: Cluster, *workers: FakeWorker) -> list[int]:
    sessions = [cluster.sessions.get(worker.member.incarnation) for worker in workers]
    return [session.view().num_unreported_tokens for session in sessions if session is not None]


async def test_the_last_prompt_token_is_computed_even_if_its_block_is_cached(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("d"))
    prefill = await cluster.start(FakeWorker("p", role=PREFILL))
    generation = make_generation(num_prompt_tokens=64)
    root = root_key(model_fingerprint=worker.description.model.fingerprint)
    blocks = BlockEvents(sequence=1, stored=b"".join(chain_keys(root, generation.prompt_token_ids)))
    cluster.directory.heartbeat(worker.member.incarnation, load=WorkerLoad(), blocks=blocks, now_s=0.0)
    await collect(cluster.dispatcher(prefill_threshold_tokens=16), generation)
    assert len(prefill.submits) == 1  # the last block counts as 16 tokens to compute


async def test_the_first_token_may_come_from_the_prefill_worker(cluster: Cluster) -> None:
    decode = await cluster.start(FakeWorker("d", max_answer_tokens=0))
    await cluster.start(FakeWorker("p", role=PREFILL))
    generation = make_generation(num_prompt_tokens=LONG, max_tokens=3)
    stream = cluster.dispatcher().generate(generation)
    first = await first_chunk(stream)
    assert list(first.token_ids) == expected_tokens(generation.prompt_token_ids, 1)
    (submit,) = decode.submits
    decode.go_on(submit, first=0, num_tokens=3, finish=True)  # token 0 again
    assert_is_whole([first, *await rest(stream)], generation)


async def test_one_id_for_several_generations_at_a_time_keeps_them_apart(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("d"))
    dispatcher = cluster.dispatcher()
    generations = [
        make_generation(request_id="x" * 256, num_prompt_tokens=n, max_tokens=n) for n in range(1, 9)
    ]
    answers = await asyncio.gather(*(collect(dispatcher, generation) for generation in generations))
    for chunks, generation in zip(answers, generations, strict=True):
        assert_is_whole(chunks, generation)
    assert len({submit.request_id for submit in worker.submits}) == 8
    assert max(len(submit.request_id) for submit in worker.submits) <= 256


async def test_what_came_while_the_client_was_slow_comes_as_one_chunk(cluster: Cluster) -> None:
    await cluster.start(FakeWorker("d"))
    generation = make_generation(max_tokens=50)
    dispatcher = cluster.dispatcher()
    stream = dispatcher.generate(generation)
    chunks = [await first_chunk(stream)]
    await cluster.until_sessions(
        lambda: cluster.num_requests == 0
    )  # the worker is done, all of it waits here
    chunks += await rest(stream)
    assert_is_whole(chunks, generation)
    assert len(chunks) == 2


async def test_ready_and_models_follow_the_workers_that_decode(cluster: Cluster) -> None:
    dispatcher = cluster.dispatcher()
    await cluster.start(FakeWorker("p", role=PREFILL))
    assert (dispatcher.ready(), dispatcher.models()) == (False, [])
    small = FakeWorker("d1", role=MIXED)
    small.description.model.max_model_len = 100
    await cluster.start(FakeWorker("d0"))
    await cluster.start(small)
    assert dispatcher.ready()
    assert dispatcher.models() == [ServedModel(name="fake", max_model_len=100)]
    cluster.leave(small)
    assert dispatcher.models() == [ServedModel(name="fake", max_model_len=4096)]


# Who may come in.


async def test_one_too_many_is_refused_with_a_time_to_come_again(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("d", max_answer_tokens=1))
    dispatcher = cluster.dispatcher(max_concurrent_requests=1, max_queued_requests=1)
    running = dispatcher.generate(make_generation(max_tokens=2))
    await first_chunk(running)
    queued = asyncio.create_task(collect(dispatcher, make_generation(max_tokens=1)))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull) as refusal:
        await collect(dispatcher, make_generation())
    assert refusal.value.retry_after_s >= 1.0
    assert len(worker.submits) == 1
    await running.aclose()
    assert len(tokens_of(await queued)) == 1
    assert_is_idle(cluster, dispatcher)


async def test_waiting_in_the_queue_ends_at_the_deadline(cluster: Cluster) -> None:
    await cluster.start(FakeWorker("d", max_answer_tokens=1))
    dispatcher = cluster.dispatcher(max_concurrent_requests=1, request_timeout_s=0.5)
    running = dispatcher.generate(make_generation(max_tokens=2))
    await first_chunk(running)
    with pytest.raises(GenerationTimeout, match="in the queue"):
        await collect(dispatcher, make_generation())
    await running.aclose()
    assert_is_idle(cluster, dispatcher)


async def test_with_nobody_there_the_client_is_told_at_once(cluster: Cluster) -> None:
    dispatcher = cluster.dispatcher()
    with pytest.raises(NoWorkers, match="no worker that decodes is registered") as failure:
        await collect(dispatcher, make_generation())
    assert failure.value.retry_after_s > 0
    assert_is_idle(cluster, dispatcher)


async def test_a_worker_that_just_joined_is_waited_for(cluster: Cluster) -> None:
    worker = FakeWorker("d")
    worker.welcomes.clear()
    await worker.start()
    cluster.workers.append(worker)
    cluster.join(worker)
    generation = make_generation()
    client = asyncio.create_task(collect(cluster.dispatcher(), generation))
    await worker.until(lambda: len(worker.hellos) == 1)
    assert not client.done()
    worker.welcomes.set()
    assert_is_whole(await client, generation)


async def test_a_worker_that_never_answers_hello_is_not_waited_for_long(cluster: Cluster) -> None:
    worker = FakeWorker("d")
    worker.welcomes.clear()
    await worker.start()
    cluster.workers.append(worker)
    cluster.join(worker)
    with pytest.raises(NoWorkers, match="no worker that decodes can be reached"):
        await collect(cluster.dispatcher(connect_wait_s=0.05), make_generation())


# A storm.


async def test_after_a_storm_of_disconnects_and_deaths_nothing_is_left(cluster: Cluster) -> None:
    """500 clients that go away at any moment, over workers of which one dies and one is slow."""
    rng = random.Random(5)
    doomed = await cluster.start(FakeWorker("doomed", max_answer_tokens=3))
    workers = [
        doomed,
        await cluster.start(FakeWorker("d", max_answer_tokens=4)),
        await cluster.start(FakeWorker("m", role=MIXED)),
        await cluster.start(FakeWorker("p", role=PREFILL)),
    ]
    dispatcher = cluster.dispatcher(max_concurrent_requests=64, max_queued_requests=500)
    tasks_before = asyncio.all_tasks()

    async def client(number: int) -> None:
        generation = make_generation(
            request_id=f"r{number % 50}",
            num_prompt_tokens=rng.choice((5, LONG)),
            max_tokens=rng.randint(1, 8),
        )
        stream = dispatcher.generate(generation)
        patience = rng.randint(0, 6)
        try:
            async for _ in stream:
                patience -= 1
                if patience <= 0:
                    break
        finally:
            await stream.aclose()

    clients = [asyncio.create_task(client(number)) for number in range(500)]
    await doomed.until(lambda: len(doomed.submits) >= 20)
    await doomed.stop()
    for number in rng.sample(range(500), 250):
        clients[number].cancel()
        await asyncio.sleep(0)
    # The slow workers answer nobody to the end: those who still wait go away at last.
    async with asyncio.timeout(WAIT_S):
        await asyncio.wait(clients, timeout=0.5)
        for task in clients:
            task.cancel()
        results = await asyncio.gather(*clients, return_exceptions=True)
    unexpected = [
        result
        for result in results
        if result is not None
        and not isinstance(result, asyncio.CancelledError | NoWorkers | GenerationFailed)
    ]
    assert not unexpected
    assert_is_idle(cluster, dispatcher)
    for worker in workers[1:]:
        await worker.until(lambda worker=worker: worker.num_running == 0)
    assert sum(len(worker.submits) for worker in workers) > 100
    assert asyncio.all_tasks() <= tasks_before | {asyncio.current_task()}
