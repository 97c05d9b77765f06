"""A load generator lean enough to share two cores with what it measures: HTTP and SSE on asyncio streams."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(slots=True)
class StreamTiming:
    """When the tokens of one request arrived, in seconds of `time.perf_counter`."""

    started_s: float
    event_times_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    text: str = ""
    response_id: str = ""
    tokens: list[str] = field(default_factory=list)  # one by one, if the request asks for logprobs
    logprobs: list[float] = field(default_factory=list)  # of these
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.event_times_s[0] - self.started_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first."""
        return (self.event_times_s[-1] - self.event_times_s[0]) / max(self.num_tokens - 1, 1)

    @property
    def itl_s(self) -> list[float]:
        return [later - sooner for sooner, later in itertools.pairwise(self.event_times_s)]


async def stream_completion(
    *,
    host: str,
    port: int,
    body: dict[str, Any],
    headers: Mapping[str, str] = MappingProxyType({}),
    timing: StreamTiming | None = None,
) -> StreamTiming:
    """POSTs `body` to /v1/completions with streaming on and times every event that carries text.

    With a `timing` of the caller's, who may look at it meanwhile.
    """
    payload = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n"
        + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        + "\r\n"
    )
    timing = timing or StreamTiming(started_s=time.perf_counter())
    try:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(head.encode() + payload)
            await _read_events(reader, timing)
        finally:
            writer.close()
            await writer.wait_closed()
    except OSError as error:
        timing.error = f"{type(error).__name__}: {error}"
    return timing


async def _read_events(reader: asyncio.StreamReader, timing: StreamTiming) -> None:
    status = (await reader.readline()).decode().strip()
    if " 200 " not in f"{status} ":
        timing.error = f"{status} {(await reader.read(4096)).decode(errors='replace')[-300:]}"
        return
    finished = False
    while (line := await reader.readline()).endswith(b"\n"):  # else whoever sent it has died in mid-line
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            finished = True
            break
        event = json.loads(line[6:])
        if "error" in event:
            timing.error = str(event["error"])
            return
        timing.response_id = event["id"]
        if event["choices"]:
            timing.event_times_s.append(time.perf_counter())
            choice = event["choices"][0]
            timing.text += choice["text"]
            if choice["logprobs"] is not None:
                timing.tokens += choice["logprobs"]["tokens"]
                timing.logprobs += choice["logprobs"]["token_logprobs"]
        if event.get("usage"):
            timing.num_tokens = event["usage"]["completion_tokens"]
    if not finished or not timing.num_tokens:
        timing.error = "the stream ended before [DONE]"


async def closed_loop(
    send: Callable[[int], Awaitable[StreamTiming]], *, concurrency: int, num_requests: int
) -> list[StreamTiming]:
    """`concurrency` clients, each sending its next request when the last one ended."""
    indices = iter(range(num_requests))

    async def client() -> list[StreamTiming]:
        return [await send(index) for index in indices]

    return [
        timing
        for timings in await asyncio.gather(*(client() for _ in range(concurrency)))
        for timing in timings
    ]


async def open_loop(
    send: Callable[[int], Awaitable[StreamTiming]], *, rate_per_s: float, num_requests: int, seed: int
) -> list[StreamTiming]:
    """Poisson arrivals at `rate_per_s`, whether or not earlier requests have ended."""
    arrivals = random.Random(seed)
    tasks = []
    due_s = time.perf_counter()
    for index in range(num_requests):
        due_s += arrivals.expovariate(rate_per_s)
        await asyncio.sleep(max(due_s - time.perf_counter(), 0.0))
        tasks.append(asyncio.ensure_future(send(index)))
    return list(await asyncio.gather(*tasks))


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the closest ranks."""
    ranked = sorted(values)
    if not ranked:
        raise ValueError("a percentile of nothing")
    position = (len(ranked) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (position - low)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSummary:
    """Latencies in milliseconds at p50, p90, p99; rates per second of the whole run."""

    ttft_ms: tuple[float, float, float]
    tpot_ms: tuple[float, float, float]
    itl_ms: tuple[float, float, float]
    tokens_per_s: float
    goodput_per_s: float
    num_errors: int


def summarize(timings: Sequence[StreamTiming], *, ttft_slo_s: float, tpot_slo_s: float) -> LoadSummary:
    """Goodput counts the requests that met both objectives."""
    good = [timing for timing in timings if timing.error is None]
    if not good:
        raise RuntimeError(f"every request failed; the first: {timings[0].error}")
    wall_s = max(timing.event_times_s[-1] for timing in good) - min(timing.started_s for timing in good)
    met = sum(timing.ttft_s <= ttft_slo_s and timing.tpot_s <= tpot_slo_s for timing in good)
    return LoadSummary(
        ttft_ms=_spread([timing.ttft_s for timing in good]),
        tpot_ms=_spread([timing.tpot_s for timing in good]),
        itl_ms=_spread([gap for timing in good for gap in timing.itl_s]),
        tokens_per_s=sum(timing.num_tokens for timing in good) / wall_s,
        goodput_per_s=met / wall_s,
        num_errors=len(timings) - len(good),
    )


def _spread(values_s: Sequence[float]) -> tuple[float, float, float]:
    p50, p90, p99 = (1e3 * percentile(values_s, percent) for percent in (50, 90, 99))
    return p50, p90, p99


def random_prompt(*, seed: int, num_tokens: int, vocab_size: int) -> list[int]:
    """Token ids that share no prefix with those of another seed, so that no prefix cache helps."""
    generator = random.Random(seed)
    return [generator.randrange(10, vocab_size) for _ in range(num_tokens)]
