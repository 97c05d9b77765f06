"""A control plane in this process, with real gRPC to workers that have no engine."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from control_plane.directory.memory import MemoryDirectory
from control_plane.gateway.dispatch import DispatchSettings, PoolDispatcher
from control_plane.gateway.sessions import SessionPool
from control_plane.generation import Generation, SamplingOptions, TokenChunk
from control_plane.routing.policy import RoutingPolicy
from control_plane.routing.scorers import SCORERS
from tests.control_plane.fake_worker import WAIT_S, FakeWorker


def make_generation(
    *, request_id: str = "r", num_prompt_tokens: int = 8, max_tokens: int = 4, **fields: object
) -> Generation:
    return Generation(
        request_id=request_id,
        prompt_token_ids=[3 + number % 1000 for number in range(num_prompt_tokens)],
        sampling=SamplingOptions(seed=1, max_tokens=max_tokens),
        **fields,
    )


@dataclass
class Cluster:
    """The directory, the sessions and the dispatcher of one gateway, and the workers that were started for it."""

    directory: MemoryDirectory
    sessions: SessionPool
    workers: list[FakeWorker] = field(default_factory=list)

    def dispatcher(self, *, prefill_threshold_tokens: int = 64, **settings: object) -> PoolDispatcher:
        return PoolDispatcher(
            self.directory,
            self.sessions,
            policy=RoutingPolicy(
                prefill_threshold_tokens=prefill_threshold_tokens, weights=dict.fromkeys(SCORERS, 1.0)
            ),
            settings=DispatchSettings(
                **{
                    "max_concurrent_requests": 256,
                    "max_queued_requests": 512,
                    "request_timeout_s": 600.0,
                    "worker_wait_s": 0.0,
                    **settings,
                }
            ),
        )

    async def start(self, worker: FakeWorker) -> FakeWorker:
        """Starts it, lets it join and waits for its session."""
        await worker.start()
        self.workers.append(worker)
        self.join(worker)
        await self.until(lambda: self.is_ready(worker))
        return worker

    def join(self, worker: FakeWorker) -> None:
        self.directory.register(worker.member, now_s=0.0)

    def leave(self, worker: FakeWorker) -> None:
        self.directory.deregister(worker.member.incarnation)

    def is_ready(self, worker: FakeWorker) -> bool:
        session = self.sessions.get(worker.member.incarnation)
        return session is not None and session.is_ready

    async def until(self, holds: Callable[[], bool]) -> None:
        """Waits until something about the sessions holds."""
        async with asyncio.timeout(WAIT_S):
            while not holds():
                await self.sessions.wait_for_change()

    async def until_sessions(self, holds: Callable[[], bool]) -> None:
        """Waits until something holds that what workers send changes; nobody is told of single outputs."""
        async with asyncio.timeout(WAIT_S):
            while not holds():  # noqa: ASYNC110
                await asyncio.sleep(0)

    @property
    def num_requests(self) -> int:
        return sum(session.num_requests for session in self.sessions.sessions())


async def collect(dispatcher: PoolDispatcher, generation: Generation) -> list[TokenChunk]:
    async with asyncio.timeout(WAIT_S):
        return [chunk async for chunk in dispatcher.generate(generation)]
