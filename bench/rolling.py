"""Every worker restarted in turn, by draining it, under load: what fails, and what it does to the gaps between tokens.

Two mixed workers of one thread, each on its own core, and clients that always have a request each under way. After a
quiet phase the workers are told to drain, one after the other; the launcher starts each again, and the next one is told
once that one serves. While one is away the other has all requests, and while it starts it takes a core's worth of time
beside it. A worker that drains hands its requests over while they run; those it cannot hand over it finishes.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from bench.cluster import RunningCluster, running_cluster
from bench.load import StreamTiming, percentile, random_prompt, stream_completion
from bench.model import write_random_model
from bench.report import Claim, write_report
from bench.worker_client import watch_workers
from protos import worker_pb2, worker_pb2_grpc

VOCAB_SIZE = 2560
PROMPT_TOKENS = 64
NUM_CLIENTS = 4
NUM_WORKERS = 2
RETURN_TIMEOUT_S = 120.0
POOLS: Mapping[str, Any] = {
    "prefill": {"replicas": 0},
    "decode": {"replicas": 0},
    "mixed": {"replicas": NUM_WORKERS},
}


@dataclass(slots=True)
class Load:
    """Clients that each send their next request when the last one has ended, until `stopping` is set."""

    port: int
    decode_tokens: int
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    timings: list[StreamTiming] = field(default_factory=list)

    async def run(self) -> None:
        await asyncio.gather(*(self._client(index) for index in range(NUM_CLIENTS)))

    async def _client(self, index: int) -> None:
        number = index
        while not self.stopping.is_set():
            body = {
                "model": "bench",
                "prompt": random_prompt(seed=number, num_tokens=PROMPT_TOKENS, vocab_size=VOCAB_SIZE),
                "max_tokens": self.decode_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            self.timings.append(await stream_completion(host="127.0.0.1", port=self.port, body=body))
            number += NUM_CLIENTS

    @property
    def num_failed(self) -> int:
        return sum(timing.error is not None for timing in self.timings)

    @property
    def itl_ms(self) -> list[float]:
        return [1e3 * gap for timing in self.timings if timing.error is None for gap in timing.itl_s]


@dataclass(frozen=True, slots=True)
class Measurement:
    quiet: Load
    rolled: Load

    @property
    def p99_change_percent(self) -> float:
        return 100 * (percentile(self.rolled.itl_ms, 99) / percentile(self.quiet.itl_ms, 99) - 1)


async def measure(cluster: RunningCluster, *, quiet_s: float, decode_tokens: int) -> Measurement:
    await stop_after(0.0, warm := Load(cluster.port, decode_tokens))
    assert warm.num_failed == 0, warm.timings
    quiet, rolled = Load(cluster.port, decode_tokens), Load(cluster.port, decode_tokens)
    await stop_after(quiet_s, quiet)
    running = asyncio.create_task(rolled.run())
    for worker in await members(cluster):
        await roll(cluster, worker)
    rolled.stopping.set()
    await running
    return Measurement(quiet, rolled)


async def stop_after(seconds: float, load: Load) -> None:
    running = asyncio.create_task(load.run())
    await asyncio.sleep(seconds)
    load.stopping.set()
    await running


async def roll(cluster: RunningCluster, worker: worker_pb2.WorkerDescription) -> None:
    """Returns when the worker's next incarnation serves."""
    async with grpc.aio.insecure_channel(worker.control_address) as channel:
        await worker_pb2_grpc.WorkerStub(channel).Drain(worker_pb2.DrainRequest(), timeout=5.0)
    async with asyncio.timeout(RETURN_TIMEOUT_S):
        async for workers in watch_workers(cluster.run_dir):
            epochs = {one.worker_id: one.epoch for one in workers}
            if epochs.get(worker.worker_id, worker.epoch) != worker.epoch:
                return


async def members(cluster: RunningCluster) -> list[worker_pb2.WorkerDescription]:
    async for workers in watch_workers(cluster.run_dir):
        if len(workers) == NUM_WORKERS:
            return list(workers)
    raise RuntimeError("the directory has gone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="finish within a minute; noisier")
    quick = parser.parse_args().quick
    quiet_s, decode_tokens = (5.0, 100) if quick else (30.0, 300)
    with tempfile.TemporaryDirectory(prefix="penstock-") as directory:
        model = write_random_model(Path(directory), hidden_size=256, num_layers=4)
        settings = {"model": {"name": "bench", "path": str(model)}, "pools": POOLS}
        with running_cluster(settings) as cluster:
            found = asyncio.run(measure(cluster, quiet_s=quiet_s, decode_tokens=decode_tokens))
    print(f"{'phase':8} {'requests':>9} {'failed':>7} {'ITL p50':>11} {'p99':>11} {'longest':>11}")
    for name, load in (("quiet", found.quiet), ("rolled", found.rolled)):
        p50, p99, longest = (percentile(load.itl_ms, percent) for percent in (50, 99, 100))
        print(
            f"{name:8} {len(load.timings):9} {load.num_failed:7}"
            f" {p50:8.1f} ms {p99:8.1f} ms {longest:8.1f} ms"
        )
    for timing in found.rolled.timings:
        if timing.error is not None:
            print(f"failed: {timing.error}")
    write_report(
        "rolling",
        [
            Claim(name="failed", value=found.rolled.num_failed, unit="requests", aim=0, better="lower"),
            Claim(name="itl_p99_change", value=found.p99_change_percent, unit="%", aim=100, better="lower"),
        ],
        keep=not quick,
    )


if __name__ == "__main__":
    main()
