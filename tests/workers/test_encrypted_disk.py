"""A worker over the encrypted disk of another one: with its key it loads, with any other it does not start."""

import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kvstore.tiers.tier import Tier
from tests.workers.conftest import OpenSession, RunningWorker, StartWorker
from tests.workers.handoff_ends import wait_until
from tests.workers.worker_process import WorkerProcess

PROMPT = [(7 * i) % 250 + 3 for i in range(400)]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
NUM_BLOCKS = 25


def num_on_disk(running: RunningWorker) -> int:
    assert running.worker.tiers is not None
    return running.worker.tiers.store.describe().tiers[Tier.DISK].num_blocks


@pytest.mark.parametrize(
    ("given", "complaint"),
    [("file:{other}", "another key"), (None, "was given no key")],
    ids=["other", "none"],
)
async def test_with_the_wrong_key_it_says_so_and_serves_nothing_and_with_the_right_one_it_loads(
    start_worker: StartWorker,
    open_session: OpenSession,
    start_process: Callable[..., Awaitable[WorkerProcess]],
    tmp_path: Path,
    given: str | None,
    complaint: str,
) -> None:
    key, other, disk = tmp_path / "key", tmp_path / "other", tmp_path / "disk"
    for path in (key, other):
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
    settings: dict[str, Any] = {
        "disk_tier_path": disk, "disk_tier_key": f"file:{key}", "max_level": 0, "num_pages": 512,
        "ttft_objective_s": 30.0,
    }  # fmt: skip
    first = await start_worker(**settings)
    expected = await (await (await open_session(first)).submit("r", PROMPT, **GREEDY)).wait()
    await wait_until(lambda: num_on_disk(first) >= NUM_BLOCKS)
    await first.end()

    flag = None if given is None else given.format(other=other)
    refused = await start_process(disk_tier_path=disk, disk_tier_key=flag)
    assert complaint in str((await refused.event("refused"))["detail"])
    assert await refused.ended() == 2

    second = await start_worker(**settings)
    answer = await (await (await open_session(second)).submit("r", PROMPT, **GREEDY)).wait()
    assert answer.token_ids == expected.token_ids
    assert answer.last.num_cached_tokens > 0
    labels = {"model_name": "tiny", "tier": "disk"}
    loaded = second.worker.metrics.registry.get_sample_value("penstock_kv_loaded_blocks_total", labels)
    assert loaded is not None
    assert loaded > 0
