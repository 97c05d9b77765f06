"""How long `penstock up` takes to the first streamed token, and how much memory all its processes hold together.

The first start is cold: compiled kernels are looked for in an empty folder, as right after set-up. Time runs from the
start of the command to the first token over HTTP. Memory is the sum over the launcher and all its children, after a
prompt long enough to go through both pools: PSS, in which a page that n processes share counts 1/n in each, and RSS, in
which it counts fully in each.
"""

import argparse
import asyncio
import os
import tempfile
import time
from dataclasses import dataclass

import psutil

from bench.cluster import RunningCluster, running_cluster
from bench.load import random_prompt, stream_completion
from bench.report import Claim, write_report

MODEL = "penstock-demo"
VOCAB_SIZE = 2048
LONG_PROMPT_TOKENS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    ready_s: float
    first_token_s: float
    stop_s: float
    cpu_s: float  # of all processes up to there: it tells a busy machine from a slow start
    pss_bytes: int
    rss_bytes: int


def measure_start() -> Start:
    began_s = time.perf_counter()
    with running_cluster({}) as cluster:
        ready_s = time.perf_counter() - began_s
        ask(cluster, num_prompt_tokens=16)
        first_token_s = time.perf_counter() - began_s
        cpu_s = sum(sum(process.cpu_times()[:2]) for process in processes(cluster))
        ask(cluster, num_prompt_tokens=LONG_PROMPT_TOKENS)
        pss_bytes, rss_bytes = memory(cluster)
        stop_began_s = time.perf_counter()
    return Start(
        ready_s=ready_s,
        first_token_s=first_token_s,
        cpu_s=cpu_s,
        stop_s=time.perf_counter() - stop_began_s,
        pss_bytes=pss_bytes,
        rss_bytes=rss_bytes,
    )


def describe(start: Start) -> str:
    return (
        f"ready {start.ready_s:.2f} s, first token {start.first_token_s:.2f} s ({start.cpu_s:.1f} s of CPU), "
        f"PSS {start.pss_bytes / 1e9:.2f} GB, RSS {start.rss_bytes / 1e9:.2f} GB, stop {start.stop_s:.2f} s"
    )


def ask(cluster: RunningCluster, *, num_prompt_tokens: int) -> None:
    """One streamed token. Raises RuntimeError if none comes."""
    prompt = random_prompt(seed=num_prompt_tokens, num_tokens=num_prompt_tokens, vocab_size=VOCAB_SIZE)
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    timing = asyncio.run(stream_completion(host=cluster.host, port=cluster.port, body=body))
    if timing.error or not timing.event_times_s:
        raise RuntimeError(f"no token came: {timing.error}")


def memory(cluster: RunningCluster) -> tuple[int, int]:
    """(PSS, RSS) of all processes, printed for each."""
    total_pss = total_rss = 0
    for process in processes(cluster):
        info = process.memory_full_info()
        total_pss, total_rss = total_pss + info.pss, total_rss + info.rss
        print(f"  {info.pss / 2**20:7.0f} MiB PSS {info.rss / 2**20:7.0f} MiB RSS  {name(process)}")
    return total_pss, total_rss


def processes(cluster: RunningCluster) -> list[psutil.Process]:
    return [cluster.launcher, *cluster.launcher.children(recursive=True)]


def name(process: psutil.Process) -> str:
    arguments = process.cmdline()
    if "--worker-id" in arguments:
        return arguments[arguments.index("--worker-id") + 1]
    return next((word for word in arguments if word.startswith("control_plane.")), " ".join(arguments[:3]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one warm start after the cold one, instead of three"
    )
    quick = parser.parse_args().quick
    num_warm = 1 if quick else 3
    with tempfile.TemporaryDirectory(prefix="penstock-kernels-") as kernel_cache:
        os.environ["NUMBA_CACHE_DIR"] = kernel_cache
        starts = []
        for number in range(1 + num_warm):
            start = measure_start()
            starts.append(start)
            print(f"{'warm' if number else 'cold'}: {describe(start)}")
    cold, *warm = starts
    resident_bytes = max(start.pss_bytes for start in starts)
    write_report(
        "startup",
        [
            Claim(name="first_token_s", value=cold.first_token_s, unit="s", aim=20.0, better="lower"),
            Claim(
                name="first_token_warm_s",
                value=sorted(start.first_token_s for start in warm)[len(warm) // 2],
                unit="s",
                aim=20.0,
                better="lower",
            ),
            Claim(name="resident_gb", value=resident_bytes / 1e9, unit="GB", aim=2.5, better="lower"),
        ],
        keep=not quick,
    )


if __name__ == "__main__":
    main()
