"""What a client and its neighbours notice when a running request moves to another worker.

    make bench BENCH=migration [ARGS=--quick]

Two mixed workers with a core each, behind the gateway. For contexts of 256 to 8,192 tokens a request decodes beside two
short ones on one worker and is moved to the other. *Downtime* is the longest gap between two of its tokens from the
order to move until the first tokens behind it, less its median gap before, in steps: such median gaps. *Slow-down* is
how much longer the median gap of the two neighbours is while the blocks travel.

Then streams of the shipped model are moved to and fro for as long as they run, and each must say what it says when
nobody moves it.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cluster import RunningCluster, running_cluster
from bench.load import StreamTiming, random_prompt, stream_completion
from bench.model import write_random_model
from bench.report import Claim, write_report

CONTEXTS = (256, 1024, 4096, 8192)
VOCAB_SIZE = 2560
SETTLE_TOKENS = 40  # before the move, to know the usual gap
BEHIND_TOKENS = 10  # after it
NEIGHBOUR_TOKENS = 4000
WORKERS = ("mixed-0", "mixed-1")
POOLS = {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "mixed": {"replicas": 2}}
IDENTITY_STREAMS_AT_A_TIME = 4
IDENTITY_TOKENS = 300
MAX_TRIES = 40


@dataclass(frozen=True, slots=True)
class Moved:
    """One move as client and neighbours saw it. Seconds."""

    step_s: float  # the usual gap
    longest_s: float
    took_s: float  # from the order to its answer
    neighbours_before_s: float
    neighbours_during_s: float

    @property
    def downtime_steps(self) -> float:
        return (self.longest_s - self.step_s) / self.step_s

    @property
    def slowdown_percent(self) -> float:
        return 100 * (self.neighbours_during_s / self.neighbours_before_s - 1)


class Client:
    """Streams through the gateway, and orders of its operator."""

    def __init__(self, cluster: RunningCluster, model: str) -> None:
        self._cluster = cluster
        self._model = model
        self._admin = f"http://{cluster.host}:{cluster.port}/admin/requests"
        self.num_moves = 0

    def start(
        self, prompt: list[int], *, max_tokens: int, **fields: Any
    ) -> tuple[StreamTiming, "asyncio.Task[StreamTiming]"]:
        timing = StreamTiming(started_s=time.perf_counter())
        body = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        task = asyncio.create_task(
            stream_completion(
                host=self._cluster.host,
                port=self._cluster.port,
                body={"temperature": 0, **body, **fields},
                timing=timing,
            )
        )
        return timing, task

    async def where(self, stream: StreamTiming) -> str | None:
        reply = await asyncio.to_thread(self._cluster.get, "/admin/requests")
        return next((r["worker"] for r in reply["requests"] if r["request_id"] == _name(stream)), None)

    async def move(self, stream: StreamTiming, worker: str) -> str:
        """The outcome; `gone` if no such request runs, `busy` if it or the worker cannot now."""
        outcome = await asyncio.to_thread(
            self._post, f"{self._admin}/{_name(stream)}/move", {"worker": worker}
        )
        self.num_moves += outcome == "moved"
        return outcome

    async def move_surely(self, stream: StreamTiming, worker: str) -> None:
        for _ in range(MAX_TRIES):
            if await self.where(stream) == worker or await self.move(stream, worker) == "moved":
                return
            await asyncio.sleep(0.05)
        raise RuntimeError(f"{_name(stream)} could not be moved to {worker}")

    def _post(self, url: str, body: dict[str, str]) -> str:
        request = urllib.request.Request(
            url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return str(json.load(reply)["outcome"])
        except urllib.error.HTTPError as error:
            if error.code not in (404, 409):
                raise
            return "gone" if error.code == 404 else "busy"


async def measure(client: Client, *, context: int, repeats: int) -> list[Moved]:
    """The same request moves to and fro; the first move is warm-up."""
    neighbours = []
    for number in range(2):
        prompt = random_prompt(seed=number + 1, num_tokens=64, vocab_size=VOCAB_SIZE)
        neighbours.append(client.start(prompt, max_tokens=NEIGHBOUR_TOKENS))
    prompt = random_prompt(seed=context, num_tokens=context, vocab_size=VOCAB_SIZE)
    num_tokens = (repeats + 1) * (SETTLE_TOKENS + BEHIND_TOKENS + 200)
    mover, moving = client.start(prompt, max_tokens=num_tokens)
    found = []
    try:
        for turn in range(repeats + 1):
            await _until(mover, len(mover.event_times_s) + 2)
            here = await client.where(mover)
            there = next(worker for worker in WORKERS if worker != here)
            for neighbour, _ in neighbours:
                await client.move_surely(neighbour, str(here))
            await _until(mover, len(mover.event_times_s) + SETTLE_TOKENS)
            began_s = time.perf_counter()
            outcome = await client.move(mover, there)
            ended_s = time.perf_counter()
            if outcome != "moved":
                raise RuntimeError(f"the move of {context} tokens ended as {outcome}")
            await _until(mover, len(mover.event_times_s) + BEHIND_TOKENS)
            if turn > 0:
                found.append(_judge(mover, [timing for timing, _ in neighbours], began_s, ended_s))
    finally:
        for task in (moving, *(task for _, task in neighbours)):
            task.cancel()
        await asyncio.gather(moving, *(task for _, task in neighbours), return_exceptions=True)
    return found


def _judge(mover: StreamTiming, neighbours: Sequence[StreamTiming], began_s: float, ended_s: float) -> Moved:
    before = _gaps(mover, began_s - 10.0, began_s)[-SETTLE_TOKENS:]
    behind = [at_s for at_s in mover.event_times_s if at_s > ended_s][:BEHIND_TOKENS]
    both = range(len(neighbours))
    return Moved(
        step_s=statistics.median(before),
        longest_s=max(_gaps(mover, began_s, behind[-1])),
        took_s=ended_s - began_s,
        neighbours_before_s=statistics.median(
            gap for i in both for gap in _gaps(neighbours[i], began_s - 0.5, began_s)
        ),
        neighbours_during_s=statistics.median(
            gap for i in both for gap in _gaps(neighbours[i], began_s, max(ended_s, began_s + 0.1))
        ),
    )


def _gaps(timing: StreamTiming, start_s: float, end_s: float) -> list[float]:
    """Between tokens that came within this time."""
    return [
        gap
        for at_s, gap in zip(timing.event_times_s[1:], timing.itl_s, strict=False)
        if start_s < at_s <= end_s
    ]


async def _until(timing: StreamTiming, num_events: int) -> None:
    async with asyncio.timeout(120):
        while len(timing.event_times_s) < num_events:
            if timing.error is not None:
                raise RuntimeError(timing.error)
            await asyncio.sleep(0.001)


async def measure_identity(client: Client, *, num_moves: int) -> tuple[int, int]:
    """(streams that said what they say undisturbed, streams)."""
    num_same = num_streams = 0
    while client.num_moves < num_moves:
        numbers = range(num_streams, num_streams + IDENTITY_STREAMS_AT_A_TIME)
        expected = await asyncio.gather(*(_say(client, number, moves=False) for number in numbers))
        found = await asyncio.gather(*(_say(client, number, moves=True) for number in numbers))
        num_same += sum(a == b for a, b in zip(expected, found, strict=True))
        num_streams += len(numbers)
    return num_same, num_streams


async def _say(client: Client, number: int, *, moves: bool) -> str:
    """What a stream says; every second one is seeded, the others are greedy."""
    prompt = random_prompt(seed=number, num_tokens=100 + number % 300, vocab_size=VOCAB_SIZE)
    sampling = {"temperature": 0.8, "seed": number} if number % 2 else {}
    timing, streaming = client.start(prompt, max_tokens=IDENTITY_TOKENS, **sampling)
    while moves and not streaming.done():
        here = await client.where(timing) if timing.response_id else None
        if here is not None:
            await client.move(timing, next(worker for worker in WORKERS if worker != here))
        await asyncio.sleep(0)
    await streaming
    if timing.error is not None:
        raise RuntimeError(timing.error)
    return timing.text


def _name(stream: StreamTiming) -> str:
    """As the gateway calls the one choice of a response."""
    return f"{stream.response_id}-0"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="finish within a minute or two; noisier")
    quick = parser.parse_args().quick
    repeats, num_moves = (3, 40) if quick else (15, 1000)
    contexts = CONTEXTS[:2] if quick else CONTEXTS
    settings: dict[str, Any] = {"pools": POOLS, "migration": {"enabled": False}}
    downtime, slowdown = {}, []
    with tempfile.TemporaryDirectory(prefix="penstock-") as directory:
        model = write_random_model(Path(directory), hidden_size=512, num_layers=8, max_positions=16384)
        with running_cluster({**settings, "model": {"name": "bench", "path": str(model)}}) as cluster:
            client = Client(cluster, "bench")
            print(f"{'context':>8} {'step':>8} {'downtime':>20} {'slow-down':>10} {'move took':>10}")
            for context in contexts:
                found = asyncio.run(measure(client, context=context, repeats=repeats))
                steps = [moved.downtime_steps for moved in found]
                downtime[context] = statistics.median(steps)
                slowdown.append(statistics.median(moved.slowdown_percent for moved in found))
                print(
                    f"{context:8} {1e3 * statistics.median(m.step_s for m in found):5.1f} ms "
                    f"{downtime[context]:5.2f} steps ({min(steps):.2f}-{max(steps):.2f}) {slowdown[-1]:8.1f} % "
                    f"{1e3 * statistics.median(m.took_s for m in found):7.0f} ms"
                )
    with running_cluster(settings) as cluster:
        client = Client(cluster, "penstock-demo")
        num_same, num_streams = asyncio.run(measure_identity(client, num_moves=num_moves))
        print(f"{num_same} of {num_streams} streams identical, {client.num_moves} moves")
    claims = [
        Claim(name="downtime_steps", value=max(downtime.values()), unit="steps", aim=2, better="lower"),
        Claim(
            name="downtime_growth_8k",
            value=downtime[contexts[-1]] / max(downtime[contexts[0]], 0.1),
            unit="x",
            aim=1.2,
            better="lower",
        ),
        Claim(name="source_slowdown", value=max(slowdown), unit="%", aim=5, better="lower"),
        Claim(
            name="streams_identical", value=100 * num_same / num_streams, unit="%", aim=100, better="higher"
        ),
    ]
    write_report("migration", claims, keep=not quick)


if __name__ == "__main__":
    main()
