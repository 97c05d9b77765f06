"""What prefix reuse saves: Mooncake traces through the book of a tier, with both placement policies.

Requests come in the order of the trace. Of each, the leading blocks that are held are hits; they count as used, and the
rest are stored, for which others leave. A block of 512 tokens costs what Llama-3-8B takes for it: 2 FLOPs for each of
the 7.5e9 weights and token, and 4 x 4096 x 32 for each token and token before it.

LRU has to give the hits that an independent simulation of these traces gave, to the printed digit: the bench fails if
it does not. The cost-aware policy also meets workloads that it was not tuned on. Lookups are those of a `BlockStore` of
97,656 blocks, with the keys of a prompt at a time.

The traces are FAST25-release/traces of Mooncake's public repository (kvcache-ai/Mooncake): `ARGS='--data DIR'`.
"""

import argparse
import asyncio
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.mooncake import (
    BLOCK_SIZE_TOKENS,
    OTHER_WORKLOADS,
    WORKLOADS,
    TracedRequest,
    generate,
    read_trace,
)
from bench.report import Claim, write_report
from kvstore.blocks import DIGEST_BYTES, BlockKey
from kvstore.holdings import Holdings
from kvstore.residency import Residency
from kvstore.store import BlockStore
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.tier import BlockRun

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "mooncake"
CAPACITIES_MTOKENS = (1, 3, 10, 50)
EXPECTED = {"conversation": (5.3, 13.6, 28.5, 36.4), "synthetic": (14.2, 30.9, 56.7, 64.0)}
ROOT = BlockKey(b"root of all runs")

_LINEAR_FLOPS_PER_TOKEN = 2 * 7.5e9
_ATTENTION_FLOPS_PER_TOKEN_PAIR = 4 * 4096 * 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    at_s: float
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reuse:
    num_blocks: int
    num_hits: int
    saved_flops: float

    @property
    def hit_percent(self) -> float:
        return 100 * self.num_hits / self.num_blocks


def prefill_flops(num_blocks: int) -> float:
    """Of the first blocks of a prompt; attention is causal: a token sees half of the prompt on average."""
    num_tokens = num_blocks * BLOCK_SIZE_TOKENS
    return num_tokens * _LINEAR_FLOPS_PER_TOKEN + num_tokens**2 / 2 * _ATTENTION_FLOPS_PER_TOKEN_PAIR


def prompts(trace: Iterator[TracedRequest]) -> list[Prompt]:
    return [
        Prompt(
            at_s=request.at_s,
            keys=tuple(BlockKey(number.to_bytes(DIGEST_BYTES, "big")) for number in request.block_ids),
        )
        for request in trace
    ]


def replay(requests: Sequence[Prompt], *, capacity_tokens: int, policy: str) -> Reuse:
    tier = Residency(capacity_tokens // BLOCK_SIZE_TOKENS, policy=policy, block_size_tokens=BLOCK_SIZE_TOKENS)
    num_blocks = num_hits = 0
    saved_flops = 0.0
    for request in requests:
        hits = store(tier, request)
        num_blocks += len(request.keys)
        num_hits += hits
        saved_flops += prefill_flops(hits)
    tier.check()
    return Reuse(num_blocks=num_blocks, num_hits=num_hits, saved_flops=saved_flops)


def store(tier: Residency, request: Prompt) -> int:
    """Leading blocks that were there. All of the prompt is afterwards, as far as it fits."""
    pinned = tier.pin(request.keys)
    num_hits = len(pinned)
    tier.touch(request.keys[:num_hits], now_s=request.at_s)
    if num_hits < len(request.keys):
        run = BlockRun(
            root=ROOT,
            parent=request.keys[num_hits - 1] if num_hits else ROOT,
            first_position=num_hits,
            keys=request.keys[num_hits:],
        )
        slots, _ = tier.reserve(len(run.keys), now_s=request.at_s)
        tier.commit(slots, run=run, now_s=request.at_s)
    tier.unpin(pinned)
    return num_hits


def measure_lookups(requests: Sequence[Prompt], *, seconds: float = 2.0) -> float:
    """Blocks a second, of prompts whose blocks are mostly held."""
    num_slots = max(CAPACITIES_MTOKENS) * 1_000_000 // BLOCK_SIZE_TOKENS
    memory = MemoryTier(np.zeros(num_slots, np.uint8), block_bytes=1, policy="cost", holdings=Holdings())
    whole = BlockStore(memory, disk=None)
    for request in requests:
        num_held = len(whole.lookup(request.keys))
        reservation = whole.reserve(len(request.keys) - num_held)
        if reservation is None or num_held == len(request.keys):
            continue
        parent = request.keys[num_held - 1] if num_held else ROOT
        run = BlockRun(root=ROOT, parent=parent, first_position=num_held, keys=request.keys[num_held:])
        reservation.commit(run, slots=reservation.slots)
    num_found, started_s = 0, time.perf_counter()
    while time.perf_counter() - started_s < seconds:
        for request in requests:
            num_found += len(whole.lookup(request.keys))
    looked_up = num_found / (time.perf_counter() - started_s)
    print(
        f"  lookups {looked_up:,.0f} blocks/s found; {asyncio.run(_pins_per_s(whole, requests)):,.0f} pinned"
    )
    return looked_up


async def _pins_per_s(whole: BlockStore, requests: Sequence[Prompt]) -> float:
    num_pinned, started_s = 0, time.perf_counter()
    for request in requests:
        with await whole.pin(request.keys) as pinned:
            num_pinned += len(pinned.slots)
    return num_pinned / (time.perf_counter() - started_s)


def measure_bytes_per_block(num_blocks: int = 200_000) -> float:
    """What the book of a full tier takes, the keys themselves (49 bytes each) included."""
    tracemalloc.start()
    tier = Residency(num_blocks, policy="cost")
    keys = [BlockKey(number.to_bytes(DIGEST_BYTES, "big")) for number in range(num_blocks)]
    for first in range(0, num_blocks, 100):
        store(tier, Prompt(at_s=float(first), keys=tuple(keys[first : first + 100])))
    del keys
    used_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used_bytes / num_blocks


def compare(name: str, requests: Sequence[Prompt]) -> tuple[list[float], float]:
    """Hits of LRU in per cent by capacity, and the least of what "cost" saves of the FLOPs LRU saves."""
    percents, least = [], float("inf")
    for mtokens in CAPACITIES_MTOKENS:
        lru, cost = (
            replay(requests, capacity_tokens=mtokens * 1_000_000, policy=policy) for policy in ("lru", "cost")
        )
        ratio = cost.saved_flops / lru.saved_flops
        print(
            f"  {name:12} {mtokens:3} M tokens: LRU hits {lru.hit_percent:5.2f} %,"
            f" saves {lru.saved_flops:.4g} FLOPs; cost {cost.hit_percent:5.2f} %, {ratio:.4f} x",
            flush=True,
        )
        percents.append(lru.hit_percent)
        least = min(least, ratio)
    return percents, least


def mismatches(name: str, percents: Sequence[float]) -> list[str]:
    """Where LRU does not give what the reference gave."""
    return [
        f"MISMATCH: LRU hits {percent:.2f} % of {name} at {mtokens} M tokens, must be {expected} %"
        for mtokens, percent, expected in zip(CAPACITIES_MTOKENS, percents, EXPECTED[name], strict=True)
        if round(percent, 1) != expected
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=DATA, help="directory of the traces (default: %(default)s)"
    )
    data = parser.parse_args().data
    at_10m = CAPACITIES_MTOKENS.index(10)
    claims, wrong = [], []
    worst = lookups_per_s = float("inf")
    for name, aim in (("conversation", 28.5), ("synthetic", 56.7)):
        path = data / f"{name}_trace.jsonl"
        print(f"{name}: {path if path.exists() else 'generated, no trace is at ' + str(path)}")
        requests = prompts(read_trace(path) if path.exists() else generate(WORKLOADS[name], seed=1))
        percents, least = compare(name, requests)
        if path.exists():
            wrong += mismatches(name, percents)
        worst = min(worst, least)
        lookups_per_s = min(lookups_per_s, measure_lookups(requests))
        claims.append(
            Claim(
                name=f"lru_{name}_10m",
                value=round(percents[at_10m], 1),
                unit="%",
                aim=aim,
                better="higher",
            )
        )
    print("generated, with other habits (no claim):")
    for name, workload in OTHER_WORKLOADS.items():
        compare(name, prompts(generate(workload, seed=2)))
    print(f"book of a tier: {measure_bytes_per_block():.0f} bytes per block")
    claims += [
        Claim(name="cost_aware_flops_vs_lru", value=worst, unit="x", aim=1.0, better="higher"),
        Claim(name="lookups_per_s", value=lookups_per_s, unit="blocks/s", aim=200_000, better="higher"),
    ]
    write_report("kv_reuse", claims, keep=True)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
