"""A request that moves while it generates: what it takes, and what cannot be tried."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from control_plane.errors import CannotMove, RequestNotFound, WorkerNotFound
from control_plane.gateway.metrics import GatewayMetrics
from control_plane.gateway.move import MoveOutcome
from control_plane.gateway.moves import Moves
from protos import worker_pb2
from tests.control_plane.fake_cluster import Cluster, make_generation
from tests.control_plane.fake_worker import FakeWorker, expected_tokens
from tests.control_plane.gateway.move_scene import HANDED_OVER, LONG, Stage

# It works.


async def test_the_target_is_told_what_there_is_and_whom_to_pull_from(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    submit = scene.at_target
    assert list(submit.prompt_token_ids) == scene.generation.prompt_token_ids
    assert list(submit.output_token_ids) == scene.expected[:2]
    source = submit.kv_source
    assert (source.worker_id, source.epoch, source.request_id) == ("a", 1, scene.at_source.request_id)
    assert source.control_address == scene.source.description.control_address
    assert source.is_live
    assert submit.request_id != scene.at_source.request_id
    assert [request.moving_to.worker_id for request in scene.moves.requests()] == ["b"]
    scene.target.go_on(submit, first=2, num_tokens=6, finish=True)
    await scene.assert_is_whole()
    assert (await move).outcome is MoveOutcome.MOVED


async def test_the_first_tokens_of_the_target_are_the_switch(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.source.go_on(scene.at_source, first=2, num_tokens=2)
    await scene.read(4)
    assert not move.done()
    scene.target.output(scene.at_target.request_id, [], first=2, num_cached_tokens=3)  # says nothing yet
    scene.target.output(scene.at_target.request_id, scene.expected[2:5], first=2)
    await scene.read(5)
    report = await move
    assert (report.source, report.target, report.outcome) == ("a", "b", MoveOutcome.MOVED)
    assert report.gap_s is not None
    await scene.source.until(lambda: scene.source.aborts == [scene.at_source.request_id])
    (request,) = scene.moves.requests()
    assert request.worker == scene.target.member.incarnation
    assert request.moving_to is None
    scene.target.go_on(scene.at_target, first=5, num_tokens=3, finish=True)
    await scene.assert_is_whole()
    assert scene.target.aborts == []
    assert b'penstock_migrations_total{outcome="moved",reason="operator"} 1.0' in scene.metrics.render()


async def test_what_the_source_says_after_the_switch_is_not_heard(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.target.go_on(scene.at_target, first=2, num_tokens=1)
    await move
    scene.source.output(scene.at_source.request_id, [1, 2, 3], first=3)
    scene.source.break_sessions()
    await scene.cluster.until(lambda: not scene.cluster.is_ready(scene.source))
    scene.target.go_on(scene.at_target, first=3, num_tokens=5, finish=True)
    await scene.assert_is_whole()


async def test_a_source_that_has_handed_over_is_waited_for_no_more(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.source.output(scene.at_source.request_id, scene.expected[2:4], first=2, finish_reason=HANDED_OVER)
    await scene.read(4)
    assert not move.done()
    scene.target.output(scene.at_target.request_id, scene.expected[2:5], first=2)
    report = await move
    assert report.outcome is MoveOutcome.MOVED
    assert report.handed_over_s is not None
    scene.target.go_on(scene.at_target, first=5, num_tokens=3, finish=True)
    await scene.assert_is_whole()
    assert scene.source.aborts == scene.target.aborts == []


async def test_the_target_may_end_it_with_its_first_word(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    reason = worker_pb2.FINISH_LENGTH
    scene.target.output(scene.at_target.request_id, scene.expected[2:], first=2, finish_reason=reason)
    await scene.assert_is_whole()
    assert (await move).outcome is MoveOutcome.MOVED


async def test_a_request_can_move_there_and_back(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.target.go_on(scene.at_target, first=2, num_tokens=1)
    await move
    scene.source.max_answer_tokens = 0
    back = asyncio.create_task(scene.moves.move("r", "a"))
    await scene.source.until(lambda: len(scene.source.submits) == 2)
    again = scene.source.submits[1]
    assert again.kv_source.request_id == scene.at_target.request_id
    assert len({scene.at_source.request_id, scene.at_target.request_id, again.request_id}) == 3
    scene.source.go_on(again, first=len(again.output_token_ids), num_tokens=5, finish=True)
    await scene.assert_is_whole()
    assert (await back).outcome is MoveOutcome.MOVED


async def test_a_request_that_waits_for_its_turn_moves_without_output(cluster: Cluster) -> None:
    source = await cluster.start(FakeWorker("a", max_answer_tokens=0))
    dispatcher = cluster.dispatcher()
    moves = Moves(
        dispatcher.running, cluster.sessions, timeout_s=600, metrics=GatewayMetrics(CollectorRegistry())
    )
    stream = dispatcher.generate(make_generation(max_tokens=2))
    first = asyncio.ensure_future(anext(stream))
    await source.until(lambda: len(source.submits) == 1)
    target = await cluster.start(FakeWorker("b"))
    assert (await moves.move("r", "b")).outcome is MoveOutcome.MOVED
    assert list(target.submits[0].output_token_ids) == []
    tokens = list((await first).token_ids) + [token async for chunk in stream for token in chunk.token_ids]
    assert tokens == expected_tokens(make_generation().prompt_token_ids, 2)


async def test_the_target_is_not_told_of_a_token_that_only_the_prefill_worker_has(cluster: Cluster) -> None:
    prefill = await cluster.start(FakeWorker("p", role=worker_pb2.ROLE_PREFILL))
    source = await cluster.start(FakeWorker("a", max_answer_tokens=0))
    dispatcher = cluster.dispatcher()
    moves = Moves(
        dispatcher.running, cluster.sessions, timeout_s=600, metrics=GatewayMetrics(CollectorRegistry())
    )
    stream = dispatcher.generate(make_generation(num_prompt_tokens=LONG, max_tokens=3))
    tokens = list((await anext(stream)).token_ids)
    assert len(tokens) == 1
    target = await cluster.start(FakeWorker("b"))
    assert (await moves.move("r", "b")).outcome is MoveOutcome.MOVED
    assert list(target.submits[0].output_token_ids) == []
    tokens += [token async for chunk in stream for token in chunk.token_ids]
    assert tokens == expected_tokens(make_generation(num_prompt_tokens=LONG).prompt_token_ids, 3)
    await prefill.until(lambda: len(prefill.aborts) == 1)
    await source.until(lambda: len(source.aborts) == 1)


# What cannot be tried.


async def test_a_request_moves_to_one_worker_at_a_time(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    await scene.cluster.start(FakeWorker("c"))
    for worker_id in ("b", "c"):
        with pytest.raises(CannotMove, match="r moves to b already"):
            await scene.moves.move("r", worker_id)
    assert not move.done()
    scene.target.go_on(scene.at_target, first=2, num_tokens=6, finish=True)
    assert (await move).outcome is MoveOutcome.MOVED
    await scene.assert_is_whole()


async def test_the_id_of_an_answer_stands_for_its_only_choice(cluster: Cluster) -> None:
    source = await cluster.start(FakeWorker("a", max_answer_tokens=2))
    target = await cluster.start(FakeWorker("b", max_answer_tokens=0))
    dispatcher = cluster.dispatcher()
    moves = Moves(
        dispatcher.running, cluster.sessions, timeout_s=600, metrics=GatewayMetrics(CollectorRegistry())
    )
    streams = [dispatcher.generate(make_generation(request_id=f"cmpl-7-{n}", max_tokens=4)) for n in range(2)]
    await anext(streams[0])
    (worker,) = [worker for worker in (source, target) if worker.submits]
    other = target if worker is source else source
    move = asyncio.create_task(moves.move("cmpl-7", other.member.worker_id))
    await other.until(lambda: len(other.submits) == 1)
    assert other.submits[0].kv_source.request_id == worker.submits[0].request_id
    move.cancel()
    await asyncio.wait([move])
    for stream in streams:
        await stream.aclose()
    with pytest.raises(RequestNotFound):
        await moves.move("cmpl-7", other.member.worker_id)


async def test_the_id_of_an_answer_with_two_choices_stands_for_neither(cluster: Cluster) -> None:
    await cluster.start(FakeWorker("a", max_answer_tokens=2))
    dispatcher = cluster.dispatcher()
    moves = Moves(
        dispatcher.running, cluster.sessions, timeout_s=600, metrics=GatewayMetrics(CollectorRegistry())
    )
    streams = [dispatcher.generate(make_generation(request_id=f"cmpl-7-{n}", max_tokens=4)) for n in range(2)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(RequestNotFound, match="'cmpl-7'"):
        await moves.move("cmpl-7", "a")
    for stream in streams:
        await stream.aclose()


async def test_only_to_a_worker_that_can_go_on_with_it(stage: Stage) -> None:
    scene = await stage()
    await scene.cluster.start(FakeWorker("other", fingerprint=b"model-b"))
    await scene.cluster.start(FakeWorker("p", role=worker_pb2.ROLE_PREFILL))
    draining = FakeWorker("draining")
    draining.description.is_draining = True
    await scene.cluster.start(draining)
    mute = FakeWorker("mute")
    mute.welcomes.clear()
    await mute.start()
    scene.cluster.workers.append(mute)
    scene.cluster.join(mute)
    for worker_id, why in {
        "a": "r runs on a already",
        "other": "other serves another model than r needs",
        "p": "p is a prefill worker and does not generate",
        "draining": "draining is draining and takes no requests",
        "mute": "mute cannot be reached",
    }.items():
        with pytest.raises(CannotMove, match=why):
            await scene.moves.move("r", worker_id)
    with pytest.raises(
        WorkerNotFound, match="no worker 'z' that could take it; there are a, b, draining, mute, other"
    ):
        await scene.moves.move("r", "z")
    with pytest.raises(RequestNotFound, match="no request 'x' runs here"):
        await scene.moves.move("x", "b")
    await scene.assert_goes_on_at_source()


async def test_a_request_whose_end_the_client_has_not_read_yet_stays(stage: Stage) -> None:
    scene = await stage()
    scene.source.go_on(scene.at_source, first=2, num_tokens=6, finish=True)
    await scene.cluster.until_sessions(lambda: scene.cluster.num_requests == 0)
    with pytest.raises(CannotMove, match="r has just ended on a"):
        await scene.moves.move("r", "b")
    await scene.assert_is_whole()


async def test_a_draining_worker_gets_no_new_requests_and_makes_nobody_ready(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("a"))
    dispatcher = cluster.dispatcher(connect_wait_s=0.05)
    assert dispatcher.ready()
    worker.description.is_draining = True
    cluster.join(worker)  # it says so by registering again
    assert not dispatcher.ready()
    other = await cluster.start(FakeWorker("b"))
    stream = dispatcher.generate(make_generation(max_tokens=1))
    assert [chunk async for chunk in stream]
    assert (len(worker.submits), len(other.submits)) == (0, 1)
