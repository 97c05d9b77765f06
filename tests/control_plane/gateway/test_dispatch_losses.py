"""Clients that go away, and workers that die, fail or refuse: who goes on, and when nobody may."""

import asyncio
from typing import Any

import pytest

from control_plane.errors import (
    GenerationFailed,
    InvalidRequest,
    NoWorkers,
    PoisonRequest,
    QueueFull,
)
from protos import worker_pb2
from tests.control_plane.fake_cluster import Cluster, collect, make_generation
from tests.control_plane.fake_worker import FakeWorker, expected_tokens
from tests.control_plane.gateway.generations import (
    LONG,
    PREFILL,
    assert_is_idle,
    assert_is_whole,
    first_chunk,
    rest,
)

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
