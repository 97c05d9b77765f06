"""Two gateways over a real Redis: what came through one is found through the other; without Redis both serve."""

import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from bench.cluster import RunningCluster, running_cluster
from bench.redis_server import RedisServer
from tests.end_to_end.asking import (
    LOADABLE_TOKENS,
    ask_all,
    fields,
    gauge,
    is_idle,
    prompt,
    state,
    wait_until,
    workers,
)
from tests.end_to_end.kv_site import BLOCK_BYTES

NUM_PROMPTS = (
    6  # a gateway that knew nothing would send them all to the right one of two workers once in 64 times
)
NUM_BLOCKS = NUM_PROMPTS * LOADABLE_TOKENS // 16


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="penstock-") as directory:  # a short path: it holds a socket
        server = RedisServer(Path(directory))
        server.start()
        yield server
        server.kill()


@pytest.fixture(scope="module")
def cluster(redis: RedisServer) -> Iterator[RunningCluster]:
    settings: dict[str, Any] = {
        "gateway": {"replicas": 2},
        "directory": {"redis_url": redis.url},
        "pools": {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "mixed": {"replicas": 2}},
        "kv": {"memory_tier_bytes": 512 * BLOCK_BYTES, "disk_tier_bytes": 0, "max_level": 0},
    }
    with running_cluster(settings) as running:
        yield running


@pytest.fixture
def clients(cluster: RunningCluster) -> Iterator[list[OpenAI]]:
    """One for each gateway."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60))
            for url in urls(cluster)
        ]


def urls(cluster: RunningCluster) -> list[str]:
    return [gateway.http_url for gateway in state(cluster).gateways]


def is_shared(cluster: RunningCluster) -> bool:
    return all(gauge(url, "penstock_directory_redis_up") == 1 for url in urls(cluster))


def num_known(cluster: RunningCluster) -> list[float]:
    """Blocks, by gateway."""
    return [gauge(url, "penstock_directory_blocks") for url in urls(cluster)]


def assert_found_through_the_other(cluster: RunningCluster, clients: list[OpenAI], first_seed: int) -> None:
    prompts = [prompt(seed) for seed in range(first_seed, first_seed + NUM_PROMPTS)]
    expected = [num + NUM_BLOCKS for num in num_known(cluster)]
    computed = ask_all(clients[0], prompts)
    assert [answer.num_cached_tokens for answer in computed] == [0] * NUM_PROMPTS
    wait_until(lambda: all(num >= least for num, least in zip(num_known(cluster), expected, strict=True)))
    found = ask_all(clients[1], prompts)
    assert [answer.text for answer in found] == [answer.text for answer in computed]
    assert all(answer.num_cached_tokens > 0 for answer in found)


def test_what_came_through_one_gateway_is_found_through_the_other(
    cluster: RunningCluster, clients: list[OpenAI]
) -> None:
    wait_until(lambda: is_shared(cluster))
    assert_found_through_the_other(cluster, clients, 100)


def test_without_redis_both_serve_and_with_an_empty_one_they_share_again(
    cluster: RunningCluster, clients: list[OpenAI], redis: RedisServer
) -> None:
    redis.kill()
    wait_until(lambda: not any(gauge(url, "penstock_directory_redis_up") for url in urls(cluster)))
    prompts = [prompt(seed) for seed in (120, 121)]
    first, second = (ask_all(client, prompts) for client in clients)
    assert [answer.text for answer in first] == [answer.text for answer in second]
    redis.start()
    wait_until(lambda: is_shared(cluster))
    assert_found_through_the_other(cluster, clients, 130)


def test_a_killed_gateway_leaves_nothing_on_the_workers_and_the_other_does_not_notice(
    cluster: RunningCluster, clients: list[OpenAI]
) -> None:
    wait_until(lambda: is_shared(cluster))
    (expected,) = ask_all(clients[1], [prompt(140)], max_tokens=300)
    doomed = clients[0].completions.create(**fields(prompt(141), max_tokens=300), stream=True)
    other = clients[1].completions.create(**fields(prompt(140), max_tokens=300), stream=True)
    texts = [next(stream).choices[0].text for stream in map(iter, (doomed, other))]
    first = next(process for process in state(cluster).processes if process.name == "control")
    assert first.process_id is not None
    first.process_id.send(signal.SIGKILL)
    with pytest.raises((openai.APIError, httpx.TransportError)):
        list(doomed)
    assert texts[1] + "".join(event.choices[0].text for event in other) == expected.text
    wait_until(lambda: (found := workers(cluster)) and len(found) == 2 and all(map(is_idle, found)))
