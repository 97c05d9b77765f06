import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from control_plane.directory.member import WorkerLoad
from control_plane.gateway.dispatch import PoolDispatcher
from control_plane.gateway.metrics import GatewayMetrics
from control_plane.gateway.move import MoveOutcome
from control_plane.gateway.moves import Moves
from control_plane.gateway.rebalance import Rebalancer, RebalanceSettings
from control_plane.migration import MigrationLimits, MoveReason
from protos import worker_pb2
from tests.control_plane.fake_cluster import Cluster, make_generation
from tests.control_plane.fake_worker import FakeWorker, expected_tokens

NUM_REQUESTS = 6


@asynccontextmanager
async def rebalancing(
    cluster: Cluster, dispatcher: PoolDispatcher, *, interval_s: float = 0.02
) -> AsyncIterator[Moves]:
    moves = Moves(
        dispatcher.running, cluster.sessions, timeout_s=600, metrics=GatewayMetrics(CollectorRegistry())
    )
    limits = MigrationLimits(low_freeness=4, high_freeness=16, rest_s=600)
    settings = RebalanceSettings(limits=limits, interval_s=interval_s)
    loop = asyncio.create_task(Rebalancer(moves, cluster.sessions, settings=settings).run())
    yield moves
    loop.cancel()
    await asyncio.wait([loop])
    assert loop.cancelled()


def drain(cluster: Cluster, worker: FakeWorker) -> None:
    worker.description.is_draining = True
    cluster.join(worker)


def report(cluster: Cluster, worker: FakeWorker, **load: int) -> None:
    cluster.directory.heartbeat(
        worker.member.incarnation, load=WorkerLoad(num_pages=1024, **load), blocks=None, now_s=0.0
    )


async def start_requests(
    cluster: Cluster, dispatcher: PoolDispatcher, source: FakeWorker
) -> "list[asyncio.Task[list[int]]]":
    async def tokens(number: int) -> list[int]:
        request_id = f"{source.member.worker_id}-{number}"
        generation = make_generation(request_id=request_id, max_tokens=4)
        return [token async for chunk in dispatcher.generate(generation) for token in chunk.token_ids]

    clients = [asyncio.create_task(tokens(number)) for number in range(NUM_REQUESTS)]
    await source.until(lambda: len(source.submits) == NUM_REQUESTS)
    return clients


async def until(cluster: Cluster, holds: Callable[[], bool]) -> None:
    await cluster.until_sessions(holds)


async def test_a_draining_worker_is_emptied_without_waiting_for_the_next_look(cluster: Cluster) -> None:
    source = await cluster.start(FakeWorker("a", max_answer_tokens=2))
    dispatcher = cluster.dispatcher()
    clients = await start_requests(cluster, dispatcher, source)
    target = await cluster.start(FakeWorker("b"))
    drain(cluster, source)
    async with rebalancing(cluster, dispatcher, interval_s=3600) as moves:
        expected = expected_tokens(make_generation().prompt_token_ids, 4)
        assert await asyncio.wait_for(asyncio.gather(*clients), 10) == [expected] * NUM_REQUESTS
        await until(cluster, lambda: len(moves.recent) == NUM_REQUESTS)
        assert {(each.reason, each.outcome) for each in moves.recent} == {
            (MoveReason.DRAIN, MoveOutcome.MOVED)
        }
    assert len(target.submits) == NUM_REQUESTS


async def test_one_request_at_a_time_leaves_a_worker(cluster: Cluster) -> None:
    source = await cluster.start(FakeWorker("a", max_answer_tokens=2))
    dispatcher = cluster.dispatcher()
    clients = await start_requests(cluster, dispatcher, source)
    target = await cluster.start(FakeWorker("b", max_answer_tokens=0))
    drain(cluster, source)
    async with rebalancing(cluster, dispatcher, interval_s=0.001) as moves:
        for number in range(NUM_REQUESTS):
            await target.until(lambda number=number: len(target.submits) == number + 1)
            assert sum(request.moving_to is not None for request in moves.requests()) == 1
            submit = target.submits[number]
            target.go_on(submit, first=2, num_tokens=2, finish=True)
        expected = expected_tokens(make_generation().prompt_token_ids, 4)
        assert await asyncio.gather(*clients) == [expected] * NUM_REQUESTS


async def test_a_full_worker_gives_one_away_and_no_more_on_the_word_of_an_old_report(
    cluster: Cluster,
) -> None:
    full = await cluster.start(FakeWorker("full", max_answer_tokens=2))
    dispatcher = cluster.dispatcher()
    clients = await start_requests(cluster, dispatcher, full)
    report(cluster, full, num_running=NUM_REQUESTS, num_free_pages=3)
    leaving = await cluster.start(FakeWorker("leaving", max_answer_tokens=2))
    clients += await start_requests(cluster, dispatcher, leaving)
    await cluster.start(FakeWorker("target"))
    drain(cluster, leaving)
    async with rebalancing(cluster, dispatcher, interval_s=3600) as moves:
        # Every request that leaves the draining worker is an occasion to look at the full one again.
        await until(cluster, lambda: len(moves.recent) == NUM_REQUESTS + 1)
        assert [each.source for each in moves.recent if each.reason is MoveReason.BALANCE] == ["full"]
    for submit in full.submits:
        full.go_on(submit, first=2, num_tokens=2, finish=True)
    await asyncio.gather(*clients)


async def test_a_refused_move_is_tried_again_at_the_next_look_not_at_once(cluster: Cluster) -> None:
    source = await cluster.start(FakeWorker("a", max_answer_tokens=2))
    dispatcher = cluster.dispatcher()
    clients = await start_requests(cluster, dispatcher, source)
    target = await cluster.start(FakeWorker("b"))
    target.refusal = worker_pb2.Failure(code=worker_pb2.Failure.UNAVAILABLE, message="busy")
    drain(cluster, source)
    tried = []
    # Who looks so seldom looks once: the next look is that of another.
    for number in range(2):
        async with rebalancing(cluster, dispatcher, interval_s=3600) as moves:
            await until(cluster, lambda moves=moves: len(moves.recent) == 1)
            for _ in range(10):
                await asyncio.sleep(0)
            assert len(target.submits) == number + 1
            tried += [each.request_id for each in moves.recent]
    assert len(set(tried)) == 2  # another one was tried: what failed last does not hold up the rest
    target.refusal = None
    async with rebalancing(cluster, dispatcher, interval_s=3600):
        await asyncio.gather(*clients)


async def test_when_it_is_stopped_what_is_under_way_is_given_up(cluster: Cluster) -> None:
    source = await cluster.start(FakeWorker("a", max_answer_tokens=2))
    dispatcher = cluster.dispatcher()
    clients = await start_requests(cluster, dispatcher, source)
    target = await cluster.start(FakeWorker("b", max_answer_tokens=0))
    drain(cluster, source)
    async with rebalancing(cluster, dispatcher):
        await target.until(lambda: len(target.submits) == 1)
    await target.until(lambda: len(target.aborts) == 1)
    for submit in source.submits:
        source.go_on(submit, first=2, num_tokens=2, finish=True)
    expected = expected_tokens(make_generation().prompt_token_ids, 4)
    assert await asyncio.gather(*clients) == [expected] * NUM_REQUESTS
