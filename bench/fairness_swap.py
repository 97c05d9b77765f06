"""Preemption under page pressure: conversations whose KV comes back from memory, against those that compute it again.

Conversations go on at the same time, each turn with all that was said before; together they need several times the
pages of the worker. Without a memory tier a preempted request, and a turn whose blocks were evicted, is computed
again; with one its blocks come back from there.
"""

import asyncio
import re
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from bench.cluster import free_port, running_cluster
from bench.load import percentile, random_prompt
from bench.model import write_random_model
from protos import inference_pb2, inference_pb2_grpc

VOCAB_SIZE = 2560
NUM_CONVERSATIONS = 6
# Answers are long: who was admitted with pages for what is known grows until another must give its own up.
TURN_TOKENS, ANSWER_TOKENS = 128, 192
# All conversations need more at the end of their first turn, and two and a half times as many at that of the second.
NUM_PAGES = 96
DEADLINE_S = 300.0


@dataclass(frozen=True, slots=True)
class Run:
    seconds: float
    first_token_s: list[float]
    gaps_s: list[float]
    num_preemptions: float
    num_computed_tokens: float


def measure_swap(*, num_turns: int, repeats: int) -> float:
    """How many times longer the conversations take without memory; the median over pairs of runs."""
    ratios = []
    with tempfile.TemporaryDirectory(prefix="penstock-") as directory:
        model = write_random_model(Path(directory), hidden_size=512, num_layers=8)
        for _ in range(repeats):
            recompute = _run(model, "recompute", memory_tier_bytes=0, num_turns=num_turns)
            swap = _run(model, "swap", memory_tier_bytes=512 * 2**20, num_turns=num_turns)
            ratios.append(recompute.seconds / swap.seconds)
    return statistics.median(ratios)


def _run(model: Path, name: str, *, memory_tier_bytes: int, num_turns: int) -> Run:
    metrics_port = free_port()
    with running_cluster(_settings(model, memory_tier_bytes, metrics_port)) as cluster:
        before = _counters(metrics_port)
        started_s = time.perf_counter()
        first_token_s, gaps_s = asyncio.run(_converse(cluster.grpc_port, num_turns=num_turns))
        seconds = time.perf_counter() - started_s
        after = _counters(metrics_port)
    run = Run(
        seconds,
        first_token_s,
        gaps_s,
        after["penstock_preemptions_total"] - before["penstock_preemptions_total"],
        after["penstock_step_tokens_total"] - before["penstock_step_tokens_total"],
    )
    print(
        f"{name:9} {NUM_CONVERSATIONS} conversations of {num_turns} turns in {seconds:.1f} s:"
        f" {run.num_preemptions:.0f} preemptions, {run.num_computed_tokens:.0f} tokens computed; first token p50"
        f" {1e3 * percentile(first_token_s, 50):.0f} p99 {1e3 * percentile(first_token_s, 99):.0f} ms, between tokens"
        f" p99 {1e3 * percentile(gaps_s, 99):.0f} ms, longest {1e3 * max(gaps_s):.0f} ms"
    )
    return run


async def _converse(grpc_port: int, *, num_turns: int) -> tuple[list[float], list[float]]:
    """Times to the first token of all turns, and the gaps between all tokens."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        first_token_s: list[float] = []
        gaps_s: list[float] = []

        async def conversation(number: int) -> None:
            said: list[int] = []
            for turn in range(num_turns):
                said += random_prompt(
                    seed=1000 * number + turn, num_tokens=TURN_TOKENS, vocab_size=VOCAB_SIZE
                )
                last_s = time.perf_counter()
                request = inference_pb2.GenerateRequest(
                    model="bench",
                    prompt_token_ids=inference_pb2.TokenIds(token_ids=said),
                    max_tokens=ANSWER_TOKENS,
                    temperature=0.0,
                    ignore_eos=True,
                )
                num_answered = 0
                async for reply in stub.Generate(request, timeout=DEADLINE_S):
                    now_s = time.perf_counter()
                    if reply.token_ids:
                        (gaps_s if num_answered else first_token_s).append(now_s - last_s)
                        num_answered += len(reply.token_ids)
                        last_s = now_s
                    said += reply.token_ids

        await asyncio.gather(*(conversation(number) for number in range(NUM_CONVERSATIONS)))
        return first_token_s, gaps_s


def _counters(port: int) -> Mapping[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return {
        name: float(value) for name, value in re.findall(r"^(penstock_\w+_total)\{.*\} (\S+)$", text, re.M)
    }


def _settings(model: Path, memory_tier_bytes: int, metrics_port: int) -> Mapping[str, Any]:
    mixed = {"replicas": 1, "num_pages": NUM_PAGES, "metrics_port": metrics_port, "disk_tier_bytes": 0}
    return {
        "model": {"name": "bench", "path": str(model)},
        "pools": {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "mixed": mixed},
        "kv": {"memory_tier_bytes": memory_tier_bytes, "disk_tier_bytes": 0},
    }
