"""The Mooncake traces (FAST'25, Apache-2.0): when requests came, and the blocks of 512 tokens in their prompts.

Where the files are absent, a generator makes workloads of about the same numbers: requests, duration, prompt lengths,
and what an unbounded cache would hit (36.6 % of blocks for the conversations, 64.0 % for the mix). Conversations begin
as a Poisson process. After each request, its conversation goes on with a fixed probability, after an exponential pause:
the prompt is then the one before, its answer, and some new text. A partly filled last block is never shared.
"""

import heapq
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK_SIZE_TOKENS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedRequest:
    at_s: float
    block_ids: tuple[int, ...]  # equal ids: equal content after an equal prefix


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """`median_tokens` and `spread` (sigma of the logarithm) are of what a conversation begins with."""

    num_requests: int
    duration_s: float
    goes_on: float
    pause_s: float
    median_tokens: float
    spread: float
    tokens_per_turn: float
    num_shared_blocks: int  # of all conversations: a system prompt


WORKLOADS = {
    "conversation": Workload(
        num_requests=12_031,
        duration_s=3_537.0,
        goes_on=0.37,
        pause_s=240.0,
        median_tokens=6_000.0,
        spread=1.13,
        tokens_per_turn=1_500.0,
        num_shared_blocks=1,
    ),
    "synthetic": Workload(
        num_requests=3_993,
        duration_s=1_022.0,
        goes_on=0.70,
        pause_s=75.0,
        median_tokens=9_000.0,
        spread=0.95,
        tokens_per_turn=600.0,
        num_shared_blocks=0,
    ),
}

# Unlike the traces: agents that come back within seconds, and conversations over an afternoon.
OTHER_WORKLOADS = {
    "agents": Workload(
        num_requests=3_993,
        duration_s=1_022.0,
        goes_on=0.90,
        pause_s=8.0,
        median_tokens=4_000.0,
        spread=0.5,
        tokens_per_turn=2_500.0,
        num_shared_blocks=0,
    ),
    "afternoon": Workload(
        num_requests=4_000,
        duration_s=14_000.0,
        goes_on=0.50,
        pause_s=900.0,
        median_tokens=6_000.0,
        spread=1.13,
        tokens_per_turn=1_500.0,
        num_shared_blocks=1,
    ),
}


def read_trace(path: Path) -> Iterator[TracedRequest]:
    with path.open() as lines:
        for line in lines:
            request = json.loads(line)
            yield TracedRequest(at_s=request["timestamp"] / 1000, block_ids=tuple(request["hash_ids"]))


def generate(workload: Workload, *, seed: int) -> Iterator[TracedRequest]:
    rng = random.Random(seed)
    new_ids = itertools.count(workload.num_shared_blocks)
    shared = tuple(range(workload.num_shared_blocks))
    beginnings_per_s = workload.num_requests * (1 - workload.goes_on) / workload.duration_s
    # (time, tie-breaker, tokens of the prompt, full blocks it shares with the one before)
    arrivals = [(0.0, 0, 0, shared)]
    for number in range(1, workload.num_requests + 1):
        at_s, _, num_tokens, held = heapq.heappop(arrivals)
        if num_tokens == 0:
            num_tokens = int(rng.lognormvariate(0.0, workload.spread) * workload.median_tokens) + 1
            begins_s = at_s + rng.expovariate(beginnings_per_s)
            heapq.heappush(arrivals, (begins_s, 2 * number, 0, shared))
        num_blocks = -(-num_tokens // BLOCK_SIZE_TOKENS)
        fresh = tuple(itertools.islice(new_ids, max(0, num_blocks - len(held))))
        block_ids = (held + fresh)[:num_blocks]
        yield TracedRequest(at_s=at_s, block_ids=block_ids)
        if rng.random() < workload.goes_on:
            goes_on_s = at_s + rng.expovariate(1 / workload.pause_s)
            longer = num_tokens + int(rng.expovariate(1 / workload.tokens_per_turn)) + 1
            full = block_ids[: num_tokens // BLOCK_SIZE_TOKENS]
            heapq.heappush(arrivals, (goes_on_s, 2 * number + 1, longer, full))
