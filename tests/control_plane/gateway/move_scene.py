"""A request that moves while it generates, and the two workers and the client that a test lets speak."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from control_plane.gateway.dispatch import PoolDispatcher
from control_plane.gateway.metrics import GatewayMetrics
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


def stage_over(cluster: Cluster) -> Stage:
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
