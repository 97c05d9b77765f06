"""What the tiers bring in a running cluster: the first hit after a restart, and the later turns of conversations."""

import contextlib
import json
import os
import statistics
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.cluster import RunningCluster, running_cluster
from bench.load import random_prompt

MODEL = "penstock-demo"
VOCAB_SIZE = 2560
RESTART_PROMPT_TOKENS = 1024
NUM_CONVERSATIONS = 6
NUM_TURNS = 10
TURN_TOKENS = 128
# A quarter of what all conversations are in the end, so that each turn finds others' blocks in the pages.
KV_CACHE_BYTES = 2048 // 16 * 65536
DEADLINE_S = 60.0
_STARTTIME = 19  # of the fields of /proc/PID/stat behind the name, in clock ticks since boot


@dataclass(frozen=True, slots=True)
class Answer:
    seconds: float
    num_prompt_tokens: int
    num_cached_tokens: int


def measure_restart() -> float:
    """Seconds from the start of a worker's process to its first answer from what the one before left on disk."""
    prompt = random_prompt(seed=1, num_tokens=RESTART_PROMPT_TOKENS, vocab_size=VOCAB_SIZE)
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as directory:
        with running_cluster(_settings(disk_path=directory)) as cluster:
            _ask(cluster, prompt)
        # Stopped in order, so that all of it is on disk.
        with running_cluster(_settings(disk_path=directory)) as cluster:
            (worker,) = cluster.worker_processes()
            killed_s = time.time()
            worker.kill()
            answer = _ask_until_served(cluster, prompt)
            answered_s = time.time()
            (successor,) = cluster.worker_processes()
            started_s = _started_s(successor)
            parts = _parts_of_start(cluster, started_s=started_s, answered_s=answered_s)
    if not answer.num_cached_tokens:
        raise RuntimeError(f"nothing was found on disk: {answer}")
    print(
        f"warm restart: first hit ({answer.num_cached_tokens} of {answer.num_prompt_tokens} tokens from disk)"
        f" {answered_s - started_s:.2f} s after the process started, {answered_s - killed_s:.2f} s after the one"
        f" before was killed; the request itself took {1e3 * answer.seconds:.0f} ms"
    )
    print("  " + ", ".join(f"{part} {seconds:.2f} s" for part, seconds in parts.items()))
    return answered_s - started_s


def _started_s(process: psutil.Process) -> float:
    """When a process started, in seconds since 1970, to 10 ms. Not `create_time()`: it adds the time since boot, in
    hundredths, to the moment of the boot, of which Linux tells the whole second alone: up to a second too early."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    since_boot_s = int(fields[_STARTTIME]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot_s


def _parts_of_start(cluster: RunningCluster, *, started_s: float, answered_s: float) -> dict[str, float]:
    """What a worker's start consists of, by the events in its log."""
    (log,) = (cluster.run_dir / "logs").glob("mixed*.log")
    times_s = {"start": started_s}
    for line in log.read_text().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if entry["unix_s"] >= started_s:
                times_s[entry["event"]] = entry["unix_s"]
    times_s["answer"] = answered_s
    ends = {
        "interpreter and settings": "loading_kernels",
        "torch, numba, kernels and the worker's modules": "loading",
        "weights": "loading_weights",
        "pages, tiers and sockets": "ready",
        "directory and request": "answer",
    }
    begins = ("start", *ends.values())
    return {
        part: times_s[end] - times_s[begin] for begin, (part, end) in zip(begins, ends.items(), strict=False)
    }


def measure_turns() -> None:
    """Prints what turns 2 to 10 of interleaved conversations compute and wait for, without and with tiers."""
    for name, memory_bytes, disk_bytes in (
        ("device pages alone", 0, 0),
        ("with memory", 256 * 2**20, 0),
        ("with memory for a turn, and disk", 16 * 2**20, 512 * 2**20),
    ):
        with (
            tempfile.TemporaryDirectory(prefix="penstock-bench-") as directory,
            running_cluster(
                _settings(disk_path=directory, memory_tier_bytes=memory_bytes, disk_tier_bytes=disk_bytes)
            ) as cluster,
        ):
            answers = _converse(cluster)
        computed = sum(answer.num_prompt_tokens - answer.num_cached_tokens for answer in answers)
        median_ms = 1e3 * statistics.median(answer.seconds for answer in answers)
        print(
            f"turns 2-{NUM_TURNS}, {name:34} {computed:7} of {sum(a.num_prompt_tokens for a in answers)} prompt"
            f" tokens computed, first token after {median_ms:.0f} ms (median)"
        )


def _converse(cluster: RunningCluster) -> list[Answer]:
    """Every turn of every conversation in turn; the answers to all but the first."""
    prompts: list[list[int]] = [[] for _ in range(NUM_CONVERSATIONS)]
    later = []
    for turn in range(NUM_TURNS):
        for number, prompt in enumerate(prompts):
            prompt += random_prompt(seed=1000 * number + turn, num_tokens=TURN_TOKENS, vocab_size=VOCAB_SIZE)
            answer = _ask(cluster, prompt)
            if turn:
                later.append(answer)
    return later


def _ask_until_served(cluster: RunningCluster, prompt: list[int]) -> Answer:
    give_up_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            return _ask(cluster, prompt)
        except urllib.error.HTTPError as error:  # no worker yet
            error.close()
            if time.monotonic() > give_up_s:
                raise
            time.sleep(0.02)


def _ask(cluster: RunningCluster, prompt: list[int]) -> Answer:
    """One token: what it takes is the time to the first one."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{cluster.url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started_s = time.perf_counter()
    with urllib.request.urlopen(request, timeout=DEADLINE_S) as reply:
        usage: dict[str, Any] = json.load(reply)["usage"]
    seconds = time.perf_counter() - started_s
    details = usage.get("prompt_tokens_details") or {}
    return Answer(seconds, usage["prompt_tokens"], details.get("cached_tokens") or 0)


def _settings(**kv: Any) -> Mapping[str, Any]:
    pools = {
        "prefill": {"replicas": 0},
        "decode": {"replicas": 0},
        "mixed": {"replicas": 1, "kv_cache_bytes": KV_CACHE_BYTES},
    }
    return {"pools": pools, "kv": kv}
