"""One worker with small tiers, that can be stopped and started again over the same disk."""

import contextlib
from pathlib import Path
from typing import Any

import psutil
from openai import OpenAI

from bench.cluster import running_cluster
from tests.end_to_end.asking import ask_all, is_idle, prompt, tiers, wait_until, workers

BLOCK_BYTES = 65536  # of the model that ships with us
NUM_PAGES = 320
MEMORY_BLOCKS = 512
ONE_WORKER: dict[str, Any] = {
    "prefill": {"replicas": 0},
    "decode": {"replicas": 0},
    "mixed": {"replicas": 1, "num_pages": NUM_PAGES},
}
# More than the pages hold and less than the memory does; more than both.
PAST_THE_PAGES = range(1000, 1000 + 9)
PAST_THE_MEMORY = range(2000, 2000 + 14)


class Site:
    def __init__(self, directory: Path) -> None:
        self.disk_path = directory / "kv"
        self._kv = {
            "memory_tier_bytes": MEMORY_BLOCKS * BLOCK_BYTES,
            "disk_tier_bytes": 128 * 2**20,
            "disk_path": str(self.disk_path),
        }
        self._running = contextlib.ExitStack()
        self.start()

    def start(self) -> None:
        settings = {"pools": ONE_WORKER, "kv": self._kv}
        self.cluster = self._running.enter_context(running_cluster(settings))
        self.client = OpenAI(base_url=self.cluster.url, api_key="unused", max_retries=0, timeout=60)
        self._running.callback(self.client.close)

    def restart(self) -> None:
        """All of it, in order."""
        self.stop()
        self.start()

    def stop(self) -> None:
        self._running.close()

    def worker(self) -> psutil.Process:
        return self.cluster.worker_processes()[0]

    def wait_until_idle(self) -> None:
        wait_until(lambda: all(map(is_idle, workers(self.cluster))))

    def num_hits(self, tier: str) -> int:
        return tiers(self.cluster)["mixed-0", tier].num_hit_blocks

    def fill(self, seeds: range) -> None:
        ask_all(self.client, map(prompt, seeds), max_tokens=1)
