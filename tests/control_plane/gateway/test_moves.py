"""A request that moves while it generates: every order in which two workers and a client can speak, fail and leave."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from control_plane.errors import CannotMove, RequestNotFound, WorkerNotFound
from control_plane.gateway.dispatch import PoolDispatcher
from control_plane.gateway.metrics import GatewayMetrics
from control_plane.gateway.move import MoveOutcome
from control_plane.gateway.moves import MoveReport, Moves
from control_plane.generation import Generation, TokenChunk
from protos import worker_pb2
from tests.control_plane.fake_cluster import Cluster, make_generation
from tests.control_plane.fake_worker import WAIT_S, FakeWorker, expected_tokens

MAX_TOKENS = 8
LONG = 200
HANDED_OVER = worker_pb2.FINISH_HANDED_OVER
FAILURE = worker_pb2.Failure


@dataclass
class Scene:
    """Request "r" of 8 tokens, of which worker "a" has told 2 and the client has them; worker "b" is idle and mute."""

    cluster: Cluster
    source: FakeWorker
    target: FakeWorker
    dispatcher: PoolDispatcher
    moves: Moves
    metrics: GatewayMetrics
    generation: Generation
    stream: AsyncGenerator[TokenChunk, None]
    tokens: list[int] = field(default_factory=list)

    @property
    def expected(self) -> list[int]:
        return expected_tokens(self.generation.prompt_token_ids, MAX_TOKENS)

    @property
    def at_source(self) -> worker_pb2.Submit:
        return self.source.submits[0]

    @property
    def at_target(self) -> worker_pb2.Submit:
        return self.target.submits[-1]

    async def begin(self) -> "asyncio.Task[MoveReport]":
        num_submits = len(self.target.submits)
        task = asyncio.create_task(self.moves.move("r", "b"))
        await self.target.until(lambda: len(self.target.submits) == num_submits + 1)
        return task

    async def read(self, num_tokens: int) -> None:
        """Until the client has so many."""
        async with asyncio.timeout(WAIT_S):
            while len(self.tokens) < num_tokens:
                self.tokens += (await anext(self.stream)).token_ids

    async def assert_goes_on_at_source(self) -> None:
        """As if nothing had been tried; the target has been told to forget it."""
        self.source.go_on(
            self.at_source, first=len(self.tokens), num_tokens=MAX_TOKENS - len(self.tokens), finish=True
        )
        await self.assert_is_whole()
        assert self.source.aborts == []
        assert len(self.source.submits) == 1

    async def assert_is_whole(self) -> None:
        async with asyncio.timeout(WAIT_S):
            self.tokens += [token async for chunk in self.stream for token in chunk.token_ids]
        assert self.tokens == self.expected
        assert self.cluster.num_requests == 0
        assert self.dispatcher.running == set()

    async def target_is_told_to_stop(self) -> None:
        await self.target.until(lambda: self.target.aborts[-1:] == [self.at_target.request_id])


Stage = Callable[..., Awaitable[Scene]]


@pytest.fixture
def stage(cluster: Cluster) -> Stage:
    async def prepare(*, timeout_s: float = 600.0, **settings: object) -> Scene:
        source = await cluster.start(FakeWorker("a", max_answer_tokens=2))
        dispatcher = cluster.dispatcher(**{"max_retries": 0, **settings})
        metrics = GatewayMetrics(CollectorRegistry())
        generation = make_generation(max_tokens=MAX_TOKENS)
        scene = Scene(
            cluster=cluster,
            source=source,
            target=FakeWorker("b", epoch=7, max_answer_tokens=0),
            dispatcher=dispatcher,
            moves=Moves(dispatcher.running, cluster.sessions, timeout_s=timeout_s, metrics=metrics),
            metrics=metrics,
            generation=generation,
            stream=dispatcher.generate(generation),
        )
        await scene.read(2)
        await cluster.start(scene.target)
        return scene

    return prepare


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


# The source goes on.


@pytest.mark.parametrize("code", [FAILURE.UNAVAILABLE, FAILURE.OVERLOADED, FAILURE.INVALID, FAILURE.INTERNAL])
async def test_when_the_target_refuses_the_source_goes_on(stage: Stage, code: int) -> None:
    scene = await stage()
    scene.target.refusal = FAILURE(code=code, message="no pages")
    report = await (await scene.begin())
    assert (report.outcome, report.detail) == (MoveOutcome.REFUSED, "no pages")
    await scene.assert_goes_on_at_source()


async def test_when_the_target_dies_the_source_goes_on(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.source.go_on(scene.at_source, first=2, num_tokens=1)
    await scene.read(3)
    await scene.target.stop()
    assert (await move).outcome is MoveOutcome.TARGET_LOST
    await scene.assert_goes_on_at_source()


@pytest.mark.parametrize("first", [0, 1, 2, 3])
async def test_a_target_with_other_tokens_is_refused(stage: Stage, first: int) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.source.go_on(scene.at_source, first=2, num_tokens=2)
    await scene.read(4)
    wrong = [*scene.expected[first:3], 49_999, scene.expected[4]]
    scene.target.output(scene.at_target.request_id, wrong, first=first)
    report = await move
    assert report.outcome is MoveOutcome.DIVERGED
    assert f"has 49999 as token 3, which was {scene.expected[3]}" in report.detail
    await scene.target_is_told_to_stop()
    await scene.assert_goes_on_at_source()


async def test_a_target_that_leaves_out_a_token_is_refused(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.target.go_on(scene.at_target, first=3, num_tokens=1)
    report = await move
    assert report.outcome is MoveOutcome.DIVERGED
    assert "begins with token 3, but token 2 is missing" in report.detail
    await scene.assert_goes_on_at_source()


async def test_a_request_that_ends_before_it_has_moved_ends_where_it_is(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.source.go_on(scene.at_source, first=2, num_tokens=6, finish=True)
    await scene.assert_is_whole()
    assert (await move).outcome is MoveOutcome.FINISHED
    await scene.target_is_told_to_stop()


async def test_a_move_that_takes_too_long_is_given_up_and_may_be_tried_again(stage: Stage) -> None:
    scene = await stage(timeout_s=0.05)
    report = await (await scene.begin())
    assert report.outcome is MoveOutcome.TIMED_OUT
    await scene.target_is_told_to_stop()
    scene.target.max_answer_tokens = None
    assert (await (await scene.begin())).outcome is MoveOutcome.MOVED
    await scene.assert_is_whole()
    assert len({submit.request_id for submit in scene.target.submits}) == 2


async def test_when_nobody_waits_for_a_move_any_more_it_is_given_up(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    move.cancel()
    with pytest.raises(asyncio.CancelledError):
        await move
    await scene.target_is_told_to_stop()
    assert [report.outcome for report in scene.moves.recent] == [MoveOutcome.ENDED]
    await scene.assert_goes_on_at_source()


# It fails as any attempt does, and is tried again.


async def test_when_the_source_dies_first_the_request_is_tried_again_from_its_tokens(stage: Stage) -> None:
    scene = await stage(max_retries=1)
    move = await scene.begin()
    first_try = scene.at_target.request_id
    scene.target.max_answer_tokens = None
    await scene.source.stop()
    await scene.assert_is_whole()
    assert (await move).outcome is MoveOutcome.SOURCE_LOST
    assert first_try in scene.target.aborts
    assert not scene.at_target.HasField("kv_source")
    assert list(scene.at_target.output_token_ids) == scene.expected[:2]


async def test_when_the_source_gives_it_up_first_it_is_tried_again(stage: Stage) -> None:
    scene = await stage(max_retries=1)
    move = await scene.begin()
    scene.target.max_answer_tokens = None
    scene.source.output(scene.at_source.request_id, [], first=0, finish_reason=worker_pb2.FINISH_ABORT)
    await scene.assert_is_whole()
    assert (await move).outcome is MoveOutcome.SOURCE_LOST


async def test_a_target_that_dies_with_all_in_its_hands_is_to_blame(stage: Stage) -> None:
    scene = await stage(max_retries=1)
    move = await scene.begin()
    scene.source.output(scene.at_source.request_id, scene.expected[2:3], first=2, finish_reason=HANDED_OVER)
    await scene.read(3)
    scene.source.max_answer_tokens = None
    await scene.target.stop()
    assert (await move).outcome is MoveOutcome.TARGET_LOST
    await scene.assert_is_whole()
    assert list(scene.source.submits[1].output_token_ids) == scene.expected[:3]


async def test_a_target_that_talks_nonsense_with_all_in_its_hands_is_to_blame(stage: Stage) -> None:
    scene = await stage(max_retries=1)
    move = await scene.begin()
    scene.source.output(scene.at_source.request_id, scene.expected[2:3], first=2, finish_reason=HANDED_OVER)
    await scene.read(3)
    scene.source.max_answer_tokens = None
    scene.target.output(scene.at_target.request_id, [49_999], first=2)
    assert (await move).outcome is MoveOutcome.DIVERGED
    await scene.assert_is_whole()
    await scene.target_is_told_to_stop()


async def test_a_target_that_is_silent_with_all_in_its_hands_is_to_blame(stage: Stage) -> None:
    scene = await stage(max_retries=1, timeout_s=0.05)
    move = await scene.begin()
    scene.source.max_answer_tokens = None
    scene.source.output(scene.at_source.request_id, [], first=2, finish_reason=HANDED_OVER)
    assert (await move).outcome is MoveOutcome.TIMED_OUT
    await scene.assert_is_whole()


async def test_a_target_that_dies_after_the_switch_is_replaced(stage: Stage) -> None:
    scene = await stage(max_retries=1)
    move = await scene.begin()
    scene.target.go_on(scene.at_target, first=2, num_tokens=2)
    await move
    await scene.read(4)
    scene.source.max_answer_tokens = None
    await scene.target.stop()
    await scene.assert_is_whole()
    assert list(scene.source.submits[1].output_token_ids) == scene.expected[:4]


# The client leaves.


async def test_a_client_that_leaves_in_the_middle_ends_it_on_both(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    await scene.stream.aclose()
    assert (await move).outcome is MoveOutcome.ENDED
    await scene.target_is_told_to_stop()
    await scene.source.until(lambda: scene.source.aborts == [scene.at_source.request_id])
    assert scene.cluster.num_requests == 0
    assert scene.moves.requests() == []


async def test_a_client_that_leaves_between_hand_over_and_first_token_ends_it_at_the_target(
    stage: Stage,
) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.source.output(scene.at_source.request_id, scene.expected[2:3], first=2, finish_reason=HANDED_OVER)
    await scene.read(3)
    await scene.stream.aclose()
    assert (await move).outcome is MoveOutcome.ENDED
    await scene.target_is_told_to_stop()
    assert scene.cluster.num_requests == 0


async def test_a_client_that_leaves_after_the_switch_ends_it_at_the_target(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.target.go_on(scene.at_target, first=2, num_tokens=1)
    await move
    await scene.stream.aclose()
    await scene.target_is_told_to_stop()
    assert scene.cluster.num_requests == 0


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
