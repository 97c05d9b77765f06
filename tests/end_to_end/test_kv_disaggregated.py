"""KV in the tiers of a prefill worker, a decode worker and a store, on encrypted disks, for several tenants."""

import asyncio
import itertools
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from bench.cluster import RunningCluster, running_cluster
from control_plane.cli.tiers import drop
from kvstore.blocks import chain_keys, root_key
from kvstore.layout import KvLayout
from protos import worker_pb2
from tests.end_to_end.asking import (
    LOADABLE_TOKENS,
    ask,
    ask_all,
    converse,
    gauge,
    is_idle,
    prompt,
    state,
    tiers,
    wait_until,
    workers,
)
from tests.end_to_end.kv_site import BLOCK_BYTES, Site
from workers.fetch import BlockFetcher, FetchTimeouts
from workers.request import KvHolder

PROMPT_BLOCKS = LOADABLE_TOKENS // 16


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def cluster(disk: Path) -> Iterator[RunningCluster]:
    key = disk / "key"
    key.touch(mode=0o600)
    key.write_text(secrets.token_hex(32))
    settings: dict[str, Any] = {
        "routing": {"prefill_threshold_tokens": 32},
        "pools": {"prefill": {"replicas": 1}, "decode": {"replicas": 1}, "store": {"replicas": 1}},
        "kv": {
            # Room for all that these tests compute: which blocks a full tier drops is not the same in every worker.
            "memory_tier_bytes": 4096 * BLOCK_BYTES,
            "disk_tier_bytes": 512 * 2**20,
            "disk_path": str(disk / "kv"),
            "disk_key": f"file:{key}",
            "max_level": 0,
        },
    }
    with running_cluster(settings) as running:
        # What is computed before a worker has heard of the store is not offered to it.
        with OpenAI(base_url=running.url, api_key="unused", max_retries=0, timeout=60) as client:
            seeds = itertools.count(9000)
            wait_until(
                lambda: ask(client, prompt(next(seeds))) and num_held(running, "store-0", "memory") > 0
            )
        wait_until(lambda: all(map(is_idle, workers(running))))
        forget(running, "prefill-0", "decode-0", "store-0")
        yield running


@pytest.fixture
def client(cluster: RunningCluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=cluster.url, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def worker(cluster: RunningCluster, name: str) -> worker_pb2.WorkerDescription:
    return next(found for found in workers(cluster) if found.worker_id == name)


def num_held(cluster: RunningCluster, name: str, tier: str) -> int:
    found = tiers(cluster).get((name, tier))
    return 0 if found is None else found.num_blocks


def num_known(cluster: RunningCluster) -> float:
    """Different blocks that the gateway knows of."""
    return gauge(state(cluster).http_url, "penstock_directory_blocks")


def settle(cluster: RunningCluster) -> None:
    """What was computed is on the prefill worker's disk and in the store, and nobody works."""
    wait_until(lambda: all(map(is_idle, workers(cluster))))
    wait_until(lambda: num_held(cluster, "prefill-0", "disk") >= num_held(cluster, "prefill-0", "memory") > 0)
    wait_until(lambda: num_held(cluster, "store-0", "memory") >= num_held(cluster, "prefill-0", "memory"))


def forget(cluster: RunningCluster, *names: str) -> None:
    """These workers hold nothing any more, on disk neither."""
    answers = drop([worker(cluster, name) for name in names], cache_salt=None)
    assert all(answer.reply is not None for answer in answers)


def restart_prefill(cluster: RunningCluster) -> None:
    """Killed; another one takes its place over the same disk, and is known with what lies there."""
    epoch = worker(cluster, "prefill-0").epoch
    cluster.process("prefill-0").kill()
    wait_until(
        lambda: any(found.worker_id == "prefill-0" and found.epoch != epoch for found in workers(cluster)),
        within_s=60,
    )
    wait_until(lambda: num_held(cluster, "prefill-0", "disk") > 0)
    wait_until(lambda: num_known(cluster) >= num_held(cluster, "prefill-0", "disk"))


def test_the_next_turn_and_the_next_user_load_what_a_killed_prefill_worker_computed(
    cluster: RunningCluster, client: OpenAI, plain: OpenAI
) -> None:
    def between() -> None:
        settle(cluster)
        restart_prefill(cluster)

    questions = [f"What is {number} plus 7? " * 12 for number in range(2)]
    turns = converse(client, questions, between)
    expected = converse(plain, questions, lambda: None)
    assert [text for text, _ in turns] == [text for text, _ in expected]
    assert 0 == turns[0][1] < turns[1][1]
    [(text, num)] = converse(client, ["Name a town. " * 6], lambda: None)
    assert text == converse(plain, ["Name a town. " * 6], lambda: None)[0][0]
    assert num > 0


def test_a_killed_prefill_worker_loads_from_its_encrypted_disk(
    cluster: RunningCluster, client: OpenAI, plain: OpenAI
) -> None:
    asked = prompt(200)
    expected = ask(plain, asked).text
    assert ask(client, asked).text == expected
    settle(cluster)
    forget(cluster, "decode-0", "store-0")
    restart_prefill(cluster)
    answer = ask(client, asked)
    assert answer.text == expected
    assert answer.num_cached_tokens > 0
    assert tiers(cluster)["prefill-0", "disk"].num_hit_blocks > 0


def raw_blocks(source: worker_pb2.WorkerDescription, token_ids: list[int]) -> bytes:
    """The KV of a prompt as it lies in the memory of a worker."""

    async def pull() -> bytes:
        model = source.model
        layout = KvLayout(
            num_layers=model.layout.num_layers, num_kv_heads=model.layout.num_kv_heads,
            head_dim=model.layout.head_dim, dtype=model.layout.dtype,
        )  # fmt: skip
        fetcher = BlockFetcher(
            model_fingerprint=model.fingerprint, layout=layout, profile_id=b"",
            timeouts=FetchTimeouts(total_s=20.0),
        )  # fmt: skip
        holder = KvHolder(
            worker_id=source.worker_id, epoch=source.epoch, control_address=source.control_address,
            num_blocks=PROMPT_BLOCKS,
        )  # fmt: skip
        keys = list(chain_keys(root_key(model_fingerprint=model.fingerprint), token_ids))
        try:
            async with await fetcher.open(holder, keys) as fetch:
                await fetch.want(first_block=0, num_blocks=PROMPT_BLOCKS, level=0)
                return bytes((await fetch.receive()).payload)
        finally:
            await fetcher.close()

    return asyncio.run(pull())


def pieces_on_disk(directory: Path, blocks: bytes) -> list[bool]:
    """Whether any file below holds 64 bytes from the middle of each block."""
    files = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]
    middles = range(BLOCK_BYTES // 2, len(blocks), BLOCK_BYTES)
    return [any(blocks[at : at + 64] in file for file in files) for at in middles]


def test_no_kv_lies_readable_on_an_encrypted_disk(
    cluster: RunningCluster, client: OpenAI, disk: Path, site: Site
) -> None:
    asked = prompt(210)
    ask(client, asked)
    settle(cluster)
    found = pieces_on_disk(disk / "kv", raw_blocks(worker(cluster, "prefill-0"), asked))
    assert found == [False] * PROMPT_BLOCKS
    ask(site.client, asked)
    site.wait_until_idle()
    in_the_open = raw_blocks(worker(site.cluster, "mixed-0"), asked)
    wait_until(lambda: pieces_on_disk(site.disk_path, in_the_open) == [True] * PROMPT_BLOCKS)


def test_a_tenant_gets_nothing_of_another_one_whoever_still_holds_it(
    cluster: RunningCluster, client: OpenAI, plain: OpenAI
) -> None:
    """From all of them, and from the disk of one that was killed."""
    prompts = [prompt(seed) for seed in range(220, 224)]
    expected = [answer.text for answer in ask_all(plain, prompts)]
    ask_all(client, prompts, salt="a")
    settle(cluster)
    others = iter("bc")

    def only_a_finds_it() -> None:
        """How much of it is loaded is for the controller to say, and this machine may be busy: not always nothing."""
        for salt in (next(others), "", "a"):
            answers = ask_all(client, prompts, salt=salt)
            assert [answer.text for answer in answers] == expected
            assert any(answer.num_cached_tokens > 0 for answer in answers) == (salt == "a"), salt
        settle(cluster)
        assert all(answer.reply is not None for answer in drop(workers(cluster), cache_salt=""))

    only_a_finds_it()
    forget(cluster, "decode-0", "store-0")
    restart_prefill(cluster)
    only_a_finds_it()
