"""Broken disks, clients that leave, and those that KV comes from, frozen or dead: every answer stays right."""

import asyncio
import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import AsyncOpenAI, OpenAI

from bench.cluster import RunningCluster, running_cluster
from bench.shared_memory import segments_of
from control_plane.cli.tiers import drop
from protos import kv_pb2, worker_pb2
from tests.end_to_end.asking import (
    LOADABLE_TOKENS,
    ask,
    ask_all,
    fields,
    gauge,
    is_idle,
    prompt,
    state,
    tiers,
    wait_until,
    workers,
)
from tests.end_to_end.kv_site import BLOCK_BYTES, PAST_THE_MEMORY, Site

# Requests go to whoever has less to do, wherever their prefix lies; all KV travels as it is.
TWO_AND_A_STORE: dict[str, Any] = {
    "pools": {
        "prefill": {"replicas": 0},
        "decode": {"replicas": 0},
        "mixed": {"replicas": 2},
        "store": {"replicas": 1},
    },
    "routing": {"weights": {"prefix_overlap": 0}},
    "kv": {"memory_tier_bytes": 512 * BLOCK_BYTES, "disk_tier_bytes": 0, "max_level": 0},
}
PROMPT_BLOCKS = LOADABLE_TOKENS // 16


@pytest.fixture(scope="module")
def peers() -> Iterator[RunningCluster]:
    with running_cluster(TWO_AND_A_STORE) as cluster:
        yield cluster


@pytest.fixture
def client(peers: RunningCluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=peers.url, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def held(cluster: RunningCluster) -> dict[str, int]:
    """Blocks in memory, by worker."""
    return {worker: tier.num_blocks for (worker, name), tier in tiers(cluster).items() if name == "memory"}


def compute_and_announce(cluster: RunningCluster, client: OpenAI, prompts: list[list[int]]) -> None:
    """Until the store has all of them and the gateway knows."""
    url = state(cluster).http_url
    num_known, num_stored = gauge(url, "penstock_directory_blocks"), held(cluster)["store-0"]
    num_blocks = len(prompts) * PROMPT_BLOCKS
    ask_all(client, prompts)
    wait_until(lambda: held(cluster)["store-0"] >= num_stored + num_blocks)
    wait_until(lambda: gauge(url, "penstock_directory_blocks") >= num_known + num_blocks)


def are_new(found: list[worker_pb2.WorkerDescription], epochs: set[int]) -> bool:
    """All but the store."""
    return len(found) == 3 and len({worker.epoch for worker in found} - epochs) == 2


def disk_of(site: Site) -> kv_pb2.TierDescription:
    return tiers(site.cluster)["mixed-0", "disk"]


def assert_nothing_is_held(cluster: RunningCluster) -> None:
    """A block that somebody still loads, sends or writes stays until it is let go."""
    wait_until(lambda: all(map(is_idle, workers(cluster))))
    drop(workers(cluster), cache_salt=None)
    left = {place: tier.num_blocks for place, tier in tiers(cluster).items() if tier.num_blocks}
    assert left == {}


def test_a_disk_that_is_full_and_then_removed_costs_no_answer(site: Site, plain: OpenAI) -> None:
    prompts = [prompt(seed) for seed in (40, 41, 42)]
    expected = [answer.text for answer in ask_all(plain, prompts)]
    ask_all(site.client, prompts[:2])
    site.fill(PAST_THE_MEMORY)
    worker, num_errors = site.worker(), disk_of(site).num_errors
    worker.rlimit(psutil.RLIMIT_FSIZE, (1 << 20, -1))  # no file grows beyond it: the next writes fail
    try:
        site.fill(range(3000, 3014))
        assert [answer.text for answer in ask_all(site.client, prompts)] == expected
        assert disk_of(site).num_errors > num_errors
    finally:
        worker.rlimit(psutil.RLIMIT_FSIZE, (-1, -1))
    shutil.rmtree(site.disk_path)
    site.fill(PAST_THE_MEMORY)
    assert [answer.text for answer in ask_all(site.client, prompts)] == expected
    assert ask(site.client, prompts[0]).num_cached_tokens > 0  # from memory as ever
    assert_nothing_is_held(site.cluster)
    site.restart()
    ask(site.client, prompts[0])
    wait_until(lambda: disk_of(site).num_blocks >= PROMPT_BLOCKS)


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Of root's writes a mode holds up none, of anybody else's a mount can be made by none."""
    if os.geteuid() == 0:
        bound = ["mount", "--bind", "-o", "ro", str(directory), str(directory)]
        if subprocess.run(bound, capture_output=True, check=False).returncode:
            pytest.skip("root may mount nothing here")
    else:
        directory.chmod(0o500)
    try:
        yield
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)
        else:
            directory.chmod(0o700)


def test_a_disk_that_becomes_read_only_costs_no_answer_and_is_still_read(site: Site, plain: OpenAI) -> None:
    prompts = [prompt(seed) for seed in (43, 44)]
    expected = [answer.text for answer in ask_all(plain, prompts)]
    ask_all(site.client, prompts)
    site.wait_until_idle()
    wait_until(lambda: disk_of(site).num_blocks >= 2 * PROMPT_BLOCKS)
    num_errors = disk_of(site).num_errors
    with read_only(site.disk_path / "mixed-0"):
        site.fill(PAST_THE_MEMORY)
        wait_until(lambda: disk_of(site).num_errors > num_errors)
        num_hits = site.num_hits("disk")
        answers = ask_all(site.client, prompts)
        assert [answer.text for answer in answers] == expected
        assert site.num_hits("disk") > num_hits
    before = disk_of(site).num_stored_blocks

    def writes_again() -> bool:
        site.fill(range(next(seeds), next(seeds)))
        return disk_of(site).num_stored_blocks > before

    seeds = iter(range(4000, 4100))
    wait_until(writes_again)
    assert_nothing_is_held(site.cluster)


async def test_clients_that_leave_while_their_prompts_are_loaded_leave_nothing(site: Site) -> None:
    held_prompts = [prompt(seed) for seed in range(50, 56)]
    ask_all(site.client, held_prompts)
    site.fill(PAST_THE_MEMORY)
    site.wait_until_idle()
    worker = site.worker()
    before = worker.num_fds(), worker.num_threads()
    segments = segments_of([worker.pid])
    generator = random.Random(2)
    async with AsyncOpenAI(base_url=site.cluster.url, api_key="unused", max_retries=0, timeout=60) as client:

        async def leave(number: int) -> None:
            asked = held_prompts[number % 6] + prompt(number, 64)
            task = asyncio.ensure_future(client.completions.create(**fields(asked, max_tokens=200)))
            await asyncio.wait([task], timeout=generator.random() / 5)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        gate = asyncio.Semaphore(8)

        async def bounded(number: int) -> None:
            async with gate:
                await leave(number)

        await asyncio.gather(*map(bounded, range(150)))
    site.wait_until_idle()
    assert_nothing_is_held(site.cluster)
    assert worker.num_fds() <= before[0] + 2
    assert worker.num_threads() <= before[1] + 2
    assert segments_of([worker.pid]) <= segments


def test_another_worker_gives_what_it_computed(peers: RunningCluster, client: OpenAI, plain: OpenAI) -> None:
    prompts = [prompt(seed) for seed in range(60, 64)]
    expected = [answer.text for answer in ask_all(plain, prompts)]
    compute_and_announce(peers, client, prompts)
    with ThreadPoolExecutor(2) as threads:  # one to each worker
        pairs = [list(threads.map(lambda _, asked=asked: ask(client, asked), range(2))) for asked in prompts]
    assert [[answer.text for answer in pair] for pair in pairs] == [[text] * 2 for text in expected]
    # One has it in its pages. How much the other one computes is for its controller to say: this machine may be busy.
    assert all(max(answer.num_cached_tokens for answer in pair) == LOADABLE_TOKENS for pair in pairs)
    assert any(min(answer.num_cached_tokens for answer in pair) > 0 for pair in pairs)


def test_a_frozen_source_holds_nobody_up(peers: RunningCluster, client: OpenAI, plain: OpenAI) -> None:
    prompts = [prompt(seed) for seed in range(64, 68)]
    expected = [answer.text for answer in ask_all(plain, prompts)]
    compute_and_announce(peers, client, prompts)
    frozen = [peers.process("mixed-0"), peers.process("store-0")]
    with ThreadPoolExecutor(8) as threads:
        for process in frozen:
            process.suspend()
        try:
            answers = list(threads.map(lambda asked: ask(client, asked), 2 * prompts))
        finally:
            for process in frozen:
                process.resume()
    assert [answer.text for answer in answers] == 2 * expected
    wait_until(lambda: len(workers(peers)) == 3, within_s=60)
    assert_nothing_is_held(peers)


def test_a_store_has_it_when_those_who_computed_it_are_dead_and_may_die_itself(
    peers: RunningCluster, client: OpenAI, plain: OpenAI
) -> None:
    prompts = [prompt(seed) for seed in range(70, 78)]
    expected = [answer.text for answer in ask_all(plain, prompts)]
    compute_and_announce(peers, client, prompts)
    epochs = {worker.epoch for worker in workers(peers)}
    computing = [peers.process(name) for name in ("mixed-0", "mixed-1")]  # before one of them is a zombie
    for process in computing:
        process.kill()
    wait_until(lambda: are_new(workers(peers), epochs), within_s=60)  # two starts at once
    answers = ask_all(client, prompts[:4])
    assert [answer.text for answer in answers] == expected[:4]
    assert any(answer.num_cached_tokens > 0 for answer in answers)
    with ThreadPoolExecutor(8) as threads:
        rest = threads.map(lambda asked: ask(client, asked), prompts[4:])
        peers.process("store-0").kill()
        assert [answer.text for answer in rest] == expected[4:]
    wait_until(lambda: len(workers(peers)) == 3, within_s=60)
    assert_nothing_is_held(peers)
