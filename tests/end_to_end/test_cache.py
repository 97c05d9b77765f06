"""What is computed once stays findable, per tenant, until somebody drops it."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from openai import OpenAI

from bench.cluster import RunningCluster, running_cluster
from control_plane.config import PROJECT_ROOT

MODEL = "penstock-demo"
WITH_STORE = {
    "pools": {
        "prefill": {"replicas": 0},
        "decode": {"replicas": 0},
        "mixed": {"replicas": 1},
        "store": {"replicas": 1},
    },
    "kv": {"memory_tier_bytes": 16 * 2**20, "disk_tier_bytes": 64 * 2**20},
}
NUM_TOKENS = 320  # 20 blocks
HELD_S = 20.0
Connect = Callable[[RunningCluster], OpenAI]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    with running_cluster(WITH_STORE) as running:
        yield running


def prompt(seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300, 1900) for _ in range(NUM_TOKENS)]


def num_cached(client: OpenAI, token_ids: list[int], *, salt: str) -> int:
    """Asks for one token, and how much of the prompt was not computed for it."""
    reply = client.completions.create(
        model=MODEL, prompt=token_ids, max_tokens=1, temperature=0, extra_body={"cache_salt": salt}
    )
    assert reply.usage is not None
    details = reply.usage.prompt_tokens_details
    return details.cached_tokens or 0 if details is not None else 0


def penstock(cluster: RunningCluster, *arguments: str) -> str:
    command = [sys.executable, "-m", "control_plane.cli", *arguments, "--run-dir", str(cluster.run_dir)]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def tiers(cluster: RunningCluster) -> dict[tuple[str, str], dict[str, Any]]:
    report = json.loads(penstock(cluster, "cache", "--json"))
    return {(worker["name"], tier["name"]): tier for worker in report["workers"] for tier in worker["tiers"]}


def wait_until(
    cluster: RunningCluster, holds: Callable[[dict[tuple[str, str], dict[str, Any]]], bool]
) -> None:
    deadline_s = time.monotonic() + HELD_S
    while not holds(found := tiers(cluster)):
        assert time.monotonic() < deadline_s, found


def test_a_dropped_tenant_is_computed_again_and_the_others_are_not(
    cluster: RunningCluster, connect: Connect
) -> None:
    client = connect(cluster)
    assert num_cached(client, prompt(1), salt="a") == 0
    assert num_cached(client, prompt(1), salt="b") == 0  # another tenant's KV is not for this one
    assert num_cached(client, prompt(1), salt="a") >= NUM_TOKENS - 16
    wait_until(
        cluster,
        lambda found: all(
            found[place]["num_blocks"] >= 2 * (NUM_TOKENS // 16 - 1)
            for place in (("mixed-0", "memory"), ("mixed-0", "disk"), ("store-0", "memory"))
        ),
    )
    said = penstock(cluster, "cache", "drop", "--salt", "a").splitlines()
    assert [line.split(":")[0] for line in said] == ["mixed-0", "store-0"]
    assert all(int(line.split()[2]) >= NUM_TOKENS // 16 - 1 for line in said)
    assert num_cached(client, prompt(1), salt="a") == 0
    assert num_cached(client, prompt(1), salt="b") >= NUM_TOKENS - 16


def test_the_report_shows_lookups_that_hit(cluster: RunningCluster, connect: Connect) -> None:
    client = connect(cluster)
    num_cached(client, prompt(2), salt="c")
    num_cached(client, prompt(2), salt="c")
    report = json.loads(penstock(cluster, "cache", "--json"))
    mixed = next(worker for worker in report["workers"] if worker["name"] == "mixed-0")
    assert mixed["num_lookup_blocks"] > 0
    assert any(tier["num_hit_blocks"] > 0 for tier in mixed["tiers"])
    shown = penstock(cluster, "cache")
    assert "mixed-0" in shown
    assert "store-0" in shown
