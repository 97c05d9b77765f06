"""What a dispatcher yields, as a test reads it and sees that all of it is there."""

import asyncio
from collections.abc import AsyncGenerator

from control_plane.gateway.dispatch import PoolDispatcher
from control_plane.generation import FinishReason, Generation, TokenChunk
from protos import worker_pb2
from tests.control_plane.fake_cluster import Cluster
from tests.control_plane.fake_worker import WAIT_S, expected_tokens

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
