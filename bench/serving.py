"""Serving through HTTP: latencies and throughput under closed and open load, and what the gateway itself costs.

`mixed` and `disaggregated` run on the same cores with the model that ships with us. The gateway's share of TTFT is the
median over HTTP minus the median straight at the worker, alternating in one run; its CPU is the process's own time.
"""

import argparse
import asyncio
import statistics
from collections.abc import Mapping
from typing import Any

import psutil

from bench.cluster import RunningCluster, running_cluster
from bench.load import (
    LoadSummary,
    StreamTiming,
    closed_loop,
    open_loop,
    random_prompt,
    stream_completion,
    summarize,
)
from bench.report import Claim, write_report
from bench.worker_client import DirectSession, find_worker
from protos import worker_pb2

MODEL = "penstock-demo"
VOCAB_SIZE = 2560
TTFT_SLO_S = 1.0
TPOT_SLO_S = 0.05
TOPOLOGIES: Mapping[str, Mapping[str, Any]] = {
    "mixed": {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "mixed": {"replicas": 2}},
    "disaggregated": {"prefill": {"replicas": 1}, "decode": {"replicas": 1}},
}


class Client:
    """Sends requests whose prompts share nothing with any other, unless the seed says so."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def send(self, seed: int, *, prompt_tokens: int, max_tokens: int) -> StreamTiming:
        prompt = random_prompt(seed=seed, num_tokens=prompt_tokens, vocab_size=VOCAB_SIZE)
        body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        return await stream_completion(host="127.0.0.1", port=self._port, body=body)


async def measure_load(client: Client, *, name: str, scale: int) -> None:
    """Prints one line for each load."""

    async def send(index: int) -> StreamTiming:
        return await client.send(1000 + index, prompt_tokens=256, max_tokens=64)

    await closed_loop(send, concurrency=2, num_requests=4)
    for concurrency in (1, 8, 32):
        timings = await closed_loop(send, concurrency=concurrency, num_requests=concurrency * 4 * scale)
        print_summary(f"{name}, {concurrency} clients", timings)
    for rate_per_s in (2.0, 6.0):
        num_requests = int(rate_per_s * 10 * scale)
        timings = await open_loop(send, rate_per_s=rate_per_s, num_requests=num_requests, seed=7)
        print_summary(f"{name}, {rate_per_s:g} requests/s", timings)


def print_summary(name: str, timings: list[StreamTiming]) -> LoadSummary:
    summary = summarize(timings, ttft_slo_s=TTFT_SLO_S, tpot_slo_s=TPOT_SLO_S)
    columns = [
        " ".join(f"{value:7.1f}" for value in row)
        for row in (summary.ttft_ms, summary.tpot_ms, summary.itl_ms)
    ]
    print(
        f"{name:28} | {' | '.join(columns)} | {summary.tokens_per_s:7.0f} | {summary.goodput_per_s:6.2f} "
        f"| {summary.num_errors}"
    )
    return summary


async def measure_gateway_ttft(cluster: RunningCluster, *, num_requests: int) -> float:
    """Milliseconds that the way through the gateway adds to the first token of a 128-token prompt, at the median."""
    session = DirectSession(await find_worker(cluster.run_dir, worker_pb2.ROLE_MIXED))
    await session.open()
    client = Client(cluster.port)
    through, direct = [], []
    for index in range(num_requests + 5):
        timing = await client.send(50_000 + index, prompt_tokens=128, max_tokens=1)
        if timing.error:
            raise RuntimeError(timing.error)
        prompt = random_prompt(seed=90_000 + index, num_tokens=128, vocab_size=VOCAB_SIZE)
        seconds = await session.time_to_first_token(prompt, request_id=f"direct-{index}")
        if index >= 5:  # the first ones warm up
            through.append(1e3 * timing.ttft_s)
            direct.append(1e3 * seconds)
    await session.close()
    added_ms = statistics.median(through) - statistics.median(direct)
    print(
        f"first token of 128: {statistics.median(through):.2f} ms through the gateway, "
        f"{statistics.median(direct):.2f} ms at the worker"
    )
    return added_ms


async def measure_gateway_cpu(cluster: RunningCluster, *, max_tokens: int) -> float:
    """CPU microseconds of the control process per token while 64 streams run; prompts included."""
    process = cluster.process("control_plane.gateway")
    client = Client(cluster.port)
    before = _cpu_s(process)
    timings = await asyncio.gather(
        *(client.send(200_000 + index, prompt_tokens=32, max_tokens=max_tokens) for index in range(64))
    )
    spent_s = _cpu_s(process) - before
    num_tokens = sum(timing.num_tokens for timing in timings)
    failed = [timing.error for timing in timings if timing.error]
    if failed:
        raise RuntimeError(f"{len(failed)} of 64 streams failed: {failed[0]}")
    return 1e6 * spent_s / num_tokens


async def count_stream_errors(cluster: RunningCluster, *, num_streams: int) -> int:
    """How many of `num_streams` requests, all started at once, do not end as they should."""
    client = Client(cluster.port)
    timings = await asyncio.gather(
        *(client.send(300_000 + index, prompt_tokens=24, max_tokens=32) for index in range(num_streams))
    )
    errors = [timing.error for timing in timings if timing.error]
    print(f"{num_streams} concurrent streams: {len(errors)} errors {errors[:1] or ''}")
    return len(errors)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="finish within a minute; noisier")
    quick = parser.parse_args().quick
    print(
        f"{'':28} | TTFT ms p50 p90 p99     | TPOT ms p50 p90 p99     | ITL ms p50 p90 p99      | tokens/s | goodput"
    )
    for name, pools in TOPOLOGIES.items():
        with running_cluster({"pools": dict(pools)}) as cluster:
            asyncio.run(measure_load(Client(cluster.port), name=name, scale=1 if quick else 4))
            if name == "mixed":
                added_ms = asyncio.run(measure_gateway_ttft(cluster, num_requests=20 if quick else 200))
            else:
                asyncio.run(measure_gateway_cpu(cluster, max_tokens=32))  # warm-up
                cpu_us = asyncio.run(measure_gateway_cpu(cluster, max_tokens=64 if quick else 512))
                num_errors = asyncio.run(count_stream_errors(cluster, num_streams=512))
    write_report(
        "serving",
        [
            Claim(name="gateway_ttft_added_p50_ms", value=added_ms, unit="ms", aim=3, better="lower"),
            Claim(name="gateway_cpu_us_per_token", value=cpu_us, unit="us", aim=60, better="lower"),
            Claim(name="streams_512_errors", value=num_errors, unit="errors", aim=0, better="lower"),
        ],
        keep=not quick,
    )


if __name__ == "__main__":
    main()
