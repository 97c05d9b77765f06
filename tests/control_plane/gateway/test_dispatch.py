import asyncio
import math
import random
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from control_plane.directory.block_events import BlockEvents
from control_plane.directory.member import WorkerLoad
from control_plane.errors import (
    GenerationFailed,
    GenerationTimeout,
    InvalidRequest,
    NoWorkers,
    PoisonRequest,
    QueueFull,
)
from control_plane.gateway.backend import Dispatcher, ServedModel
from control_plane.gateway.dispatch import PoolDispatcher
from control_plane.gateway.sessions import SessionClosed
from control_plane.generation import FinishReason, Generation, TokenChunk, WorkerEvent
from kvstore.blocks import chain_keys, root_key
from protos import worker_pb2
from tests.control_plane.fake_cluster import Cluster, collect, make_generation
from tests.control_plane.fake_worker import WAIT_S, FakeWorker, expected_tokens

PREFILL, DECODE, MIXED = worker_pb2.ROLE_PREFILL, worker_pb2.ROLE_DECODE, worker_pb2.ROLE_MIXED
LONG = 200  # prompt tokens, more than the threshold of the tests' dispatchers


def tokens_of(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def assert_is_whole(chunks: list[TokenChunk], generation: Generation) -> None:
    num_tokens = generation.sampling.max_tokens
    assert tokens_of(chunks) == expected_tokens(generation.prompt_token_ids, num_tokens)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason is FinishReason.LENGTH


def assert_is_idle(cluster: Cluster, dispatcher: PoolDispatcher) -> None:
    assert cluster.num_requests == 0
    assert (dispatcher.admission.num_running, dispatcher.admission.num_waiting) == (0, 0)


async def first_chunk(stream: AsyncGenerator[TokenChunk, None]) -> TokenChunk:
    async with asyncio.timeout(WAIT_S):
        return await anext(stream)


async def rest(stream: AsyncGenerator[TokenChunk, None]) -> list[TokenChunk]:
    async with asyncio.timeout(WAIT_S):
        return [chunk async for chunk in stream]


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


# Somebody goes away.


async def test_a_client_that_goes_away_aborts_its_request_in_every_pool(cluster: Cluster) -> None:
    decode = await cluster.start(FakeWorker("d", max_answer_tokens=2))
    prefill = await cluster.start(FakeWorker("p", role=PREFILL))
    dispatcher = cluster.dispatcher()
    stream = dispatcher.generate(make_generation(num_prompt_tokens=LONG, max_tokens=9))
    await first_chunk(stream)
    await stream.aclose()
    await decode.until(lambda: len(decode.aborts) == 1)
    await prefill.until(lambda: len(prefill.aborts) == 1)
    assert decode.aborts == prefill.aborts == [decode.submits[0].request_id]
    assert_is_idle(cluster, dispatcher)


async def test_a_cancelled_client_aborts_its_request_before_the_first_token(cluster: Cluster) -> None:
    decode = await cluster.start(FakeWorker("d", max_answer_tokens=0))
    dispatcher = cluster.dispatcher()
    client = asyncio.create_task(collect(dispatcher, make_generation()))
    await decode.until(lambda: len(decode.submits) == 1)
    client.cancel()
    await asyncio.wait([client])
    await decode.until(lambda: len(decode.aborts) == 1)
    assert_is_idle(cluster, dispatcher)


@pytest.mark.parametrize("num_tokens_before", [0, 3])
async def test_a_killed_decode_worker_is_replaced_and_no_token_is_lost_or_repeated(
    cluster: Cluster, num_tokens_before: int
) -> None:
    doomed = await cluster.start(FakeWorker("a-doomed", max_answer_tokens=num_tokens_before))
    dispatcher = cluster.dispatcher()
    generation = make_generation(max_tokens=8)
    stream = dispatcher.generate(generation)
    client = asyncio.create_task(rest(stream))
    await doomed.until(lambda: len(doomed.submits) == 1)
    heir = await cluster.start(FakeWorker("heir"))
    await doomed.stop()
    assert_is_whole(await client, generation)
    (submit,) = heir.submits
    known = list(submit.output_token_ids)
    assert known == expected_tokens(generation.prompt_token_ids, len(known))
    assert len(known) <= num_tokens_before
    assert_is_idle(cluster, dispatcher)


async def test_a_frozen_decode_worker_is_replaced_when_it_leaves_the_directory(cluster: Cluster) -> None:
    frozen = await cluster.start(FakeWorker("a-frozen", max_answer_tokens=2))
    generation = make_generation(max_tokens=6)
    dispatcher = cluster.dispatcher()
    stream = dispatcher.generate(generation)
    chunks = [await first_chunk(stream)]
    heir = await cluster.start(FakeWorker("heir"))
    cluster.leave(frozen)
    assert_is_whole(chunks + await rest(stream), generation)
    (submit,) = heir.submits
    known = list(submit.output_token_ids)
    assert len(known) >= 1  # what the client has already is not generated again
    assert known == expected_tokens(generation.prompt_token_ids, len(known))


async def test_a_worker_of_another_model_does_not_go_on_with_a_text(cluster: Cluster) -> None:
    doomed = await cluster.start(FakeWorker("a-doomed", max_answer_tokens=1))
    stream = cluster.dispatcher().generate(make_generation())
    await first_chunk(stream)
    other = await cluster.start(FakeWorker("other", fingerprint=b"model-b"))
    await doomed.stop()
    with pytest.raises(GenerationFailed, match="no other worker can go on"):
        await rest(stream)
    assert other.submits == []


async def test_a_request_that_has_output_is_not_handed_over_again(cluster: Cluster) -> None:
    doomed = await cluster.start(FakeWorker("a-doomed", max_answer_tokens=1))
    prefill = await cluster.start(FakeWorker("p", role=PREFILL))
    generation = make_generation(num_prompt_tokens=LONG, max_tokens=3)
    stream = cluster.dispatcher().generate(generation)
    chunks = [await first_chunk(stream)]
    heir = await cluster.start(FakeWorker("heir"))
    await doomed.stop()
    assert_is_whole(chunks + await rest(stream), generation)
    assert not heir.submits[0].HasField("kv_source")
    assert len(prefill.submits) == 1


async def test_a_killed_prefill_worker_does_not_matter_while_the_decode_worker_lives(
    cluster: Cluster,
) -> None:
    decode = await cluster.start(FakeWorker("d", max_answer_tokens=0))
    prefill = await cluster.start(FakeWorker("p", role=PREFILL, max_answer_tokens=0))
    generation = make_generation(num_prompt_tokens=LONG)
    client = asyncio.create_task(collect(cluster.dispatcher(), generation))
    await decode.until(lambda: len(decode.submits) == 1)
    await prefill.until(lambda: len(prefill.submits) == 1)
    await prefill.stop()
    await cluster.until(lambda: not cluster.is_ready(prefill))
    decode.go_on(decode.submits[0], first=0, num_tokens=4, finish=True)
    assert_is_whole(await client, generation)
    assert len(decode.submits) == 1


async def test_a_prefill_worker_that_fails_or_talks_nonsense_does_not_matter(cluster: Cluster) -> None:
    decode = await cluster.start(FakeWorker("d", max_answer_tokens=0))
    prefill = await cluster.start(FakeWorker("p", role=PREFILL, max_answer_tokens=0))
    generation = make_generation(num_prompt_tokens=LONG)
    client = asyncio.create_task(collect(cluster.dispatcher(), generation))
    await prefill.until(lambda: len(prefill.submits) == 1)
    request_id = prefill.submits[0].request_id
    prefill.output(request_id, [1, 2, 3], first=5)
    failure = worker_pb2.Failure(code=worker_pb2.Failure.INTERNAL, message="broken")
    prefill.output(request_id, [], first=0, finish_reason=worker_pb2.FINISH_ERROR, failure=failure)
    await cluster.until_sessions(lambda: cluster.num_requests == 1)
    await decode.until(lambda: len(decode.submits) == 1)
    decode.go_on(decode.submits[0], first=0, num_tokens=4, finish=True)
    assert_is_whole(await client, generation)


async def test_without_another_worker_a_lost_request_fails_clearly(cluster: Cluster) -> None:
    doomed = await cluster.start(FakeWorker("d", max_answer_tokens=0))
    dispatcher = cluster.dispatcher()
    client = asyncio.create_task(collect(dispatcher, make_generation()))
    await doomed.until(lambda: len(doomed.submits) == 1)
    await doomed.stop()
    with pytest.raises(NoWorkers) as failure:
        await client
    assert failure.value.retry_after_s > 0
    assert_is_idle(cluster, dispatcher)


async def test_retries_end(cluster: Cluster) -> None:
    internal = worker_pb2.Failure(code=worker_pb2.Failure.INTERNAL, message="a bug")
    workers = [await cluster.start(FakeWorker(f"d{number}")) for number in range(5)]
    for worker in workers:
        worker.refusal = internal
    dispatcher = cluster.dispatcher(max_retries=2)
    with pytest.raises(GenerationFailed, match=r"3 workers failed.*a bug"):
        await collect(dispatcher, make_generation())
    assert sum(len(worker.submits) for worker in workers) == 3
    assert max(len(worker.submits) for worker in workers) == 1
    assert_is_idle(cluster, dispatcher)


class Faltering(FakeWorker):
    """Fails every request after one token more."""

    def _answer(self, submit: worker_pb2.Submit, session: Any) -> None:
        super()._answer(submit, session)
        if submit.request_id in session.running:
            bug = worker_pb2.Failure(code=worker_pb2.Failure.INTERNAL, message="a bug")
            first = len(submit.output_token_ids) + 1
            self.output(
                submit.request_id, [], first=first, finish_reason=worker_pb2.FINISH_ERROR, failure=bug
            )


async def test_who_gets_on_has_its_retries_again(cluster: Cluster) -> None:
    workers = [await cluster.start(Faltering(f"d{number}", max_answer_tokens=1)) for number in range(2)]
    generation = make_generation(max_tokens=6)
    dispatcher = cluster.dispatcher(max_retries=1)
    assert_is_whole(await collect(dispatcher, generation), generation)
    assert sum(len(worker.submits) for worker in workers) == 6
    assert_is_idle(cluster, dispatcher)


async def test_a_worker_that_gives_up_a_request_unasked_is_replaced(cluster: Cluster) -> None:
    leaving = await cluster.start(FakeWorker("a-leaving", max_answer_tokens=0))
    generation = make_generation()
    client = asyncio.create_task(collect(cluster.dispatcher(), generation))
    await leaving.until(lambda: len(leaving.submits) == 1)
    await cluster.start(FakeWorker("heir"))
    leaving.output(leaving.submits[0].request_id, [], first=0, finish_reason=worker_pb2.FINISH_ABORT)
    assert_is_whole(await client, generation)


async def test_an_invalid_request_is_not_retried(cluster: Cluster) -> None:
    workers = [await cluster.start(FakeWorker(f"d{number}")) for number in range(2)]
    for worker in workers:
        worker.refusal = worker_pb2.Failure(code=worker_pb2.Failure.INVALID, message="token 99999 is none")
    with pytest.raises(InvalidRequest, match="token 99999 is none"):
        await collect(cluster.dispatcher(), make_generation())
    assert sum(len(worker.submits) for worker in workers) == 1


async def test_a_full_worker_is_passed_over(cluster: Cluster) -> None:
    full = await cluster.start(FakeWorker("a-full"))
    full.refusal = worker_pb2.Failure(code=worker_pb2.Failure.OVERLOADED, retry_after_s=7.0)
    await cluster.start(FakeWorker("b-free"))
    generation = make_generation()
    assert_is_whole(await collect(cluster.dispatcher(max_retries=0), generation), generation)


async def test_when_all_workers_are_full_the_client_is_told_when_to_come_again(cluster: Cluster) -> None:
    for number in range(4):
        full = await cluster.start(FakeWorker(f"d{number}"))
        full.refusal = worker_pb2.Failure(code=worker_pb2.Failure.OVERLOADED, retry_after_s=7.0)
    with pytest.raises(QueueFull) as refusal:
        await collect(cluster.dispatcher(max_retries=0), make_generation())
    assert refusal.value.retry_after_s == 7.0


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


# Poison.


async def test_a_request_of_which_two_workers_died_is_refused(cluster: Cluster) -> None:
    victims = [await cluster.start(FakeWorker(f"d{number}", max_answer_tokens=0)) for number in range(3)]
    dispatcher = cluster.dispatcher(max_retries=5)
    client = asyncio.create_task(collect(dispatcher, make_generation()))
    for victim in victims[:2]:
        await victim.until(lambda victim=victim: len(victim.submits) == 1)
        await victim.stop()
        await cluster.until(lambda victim=victim: not cluster.is_ready(victim))
        cluster.leave(victim)
    with pytest.raises(PoisonRequest, match="two workers died"):
        await client
    assert victims[2].submits == []
    assert_is_idle(cluster, dispatcher)


async def test_a_request_that_lost_two_workers_which_are_back_goes_on(cluster: Cluster) -> None:
    workers = [await cluster.start(FakeWorker(f"d{number}", max_answer_tokens=0)) for number in range(2)]
    generation = make_generation()
    client = asyncio.create_task(collect(cluster.dispatcher(), generation))
    for worker in workers:
        await worker.until(lambda worker=worker: len(worker.submits) == 1)
        worker.welcomes.clear()
        worker.break_sessions()
        await cluster.until(lambda worker=worker: not cluster.is_ready(worker))
    for worker in workers:
        worker.max_answer_tokens = None
        worker.welcomes.set()
    assert_is_whole(await client, generation)


async def test_a_request_that_went_on_after_a_death_is_not_blamed_for_the_next(cluster: Cluster) -> None:
    victims = [await cluster.start(FakeWorker(f"d{number}", max_answer_tokens=1)) for number in range(2)]
    generation = make_generation(max_tokens=4)
    stream = cluster.dispatcher().generate(generation)
    chunks = []
    for victim in victims:
        chunks.append(await first_chunk(stream))
        if victim is victims[1]:
            await cluster.start(FakeWorker("heir"))
        await victim.stop()
    assert_is_whole(chunks + await rest(stream), generation)


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
