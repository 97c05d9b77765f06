"""What one tenant's flood does to another, and what it costs to preempt: by swap to memory and by computing again.

    python -m bench.fairness [--quick]

`victim_ttft_p99_vs_alone`: one mixed worker that schedules by `fair`. The victim is a client that asks, reads the
answer, thinks and asks again, which is less than its half of the worker; first alone, then beside a flood: clients of
one other tenant that ask again at once, many times what the worker can do. For comparison the same with `priority`,
which is first come, first served.

`swap_vs_recompute`: conversations that need several times the pages there are, so that those who run preempt each other
(bench/fairness_swap.py).
"""

import argparse
import asyncio
import itertools
from collections.abc import Mapping
from typing import Any

from bench.cluster import running_cluster
from bench.fairness_swap import measure_swap
from bench.load import StreamTiming, percentile, random_prompt, stream_completion
from bench.report import Claim, write_report

VOCAB_SIZE = 2560
VICTIM_PROMPT_TOKENS, VICTIM_OUTPUT_TOKENS, VICTIM_THINKS_S = 1024, 8, 0.5
FLOOD_PROMPT_TOKENS, FLOOD_OUTPUT_TOKENS, NUM_FLOOD_CLIENTS = 512, 32, 32
# A request that comes waits for the step that runs, so steps are short beside a prompt.
STEP_TOKENS = 256


class Prompts:
    """No two alike, over all phases: what one phase computed must not be cached for the next."""

    def __init__(self) -> None:
        self._seeds = itertools.count()

    def next(self, num_tokens: int) -> list[int]:
        return random_prompt(seed=next(self._seeds), num_tokens=num_tokens, vocab_size=VOCAB_SIZE)


async def measure_victim(
    port: int, prompts: Prompts, *, num_requests: int, is_flooded: bool
) -> list[StreamTiming]:
    num_clients = NUM_FLOOD_CLIENTS if is_flooded else 0
    flood = [asyncio.create_task(_flood(port, prompts)) for _ in range(num_clients)]
    try:
        await asyncio.sleep(2.0 if is_flooded else 0.0)  # until its queue is full
        timings = []
        for _ in range(num_requests):
            timings.append(
                await _ask(
                    port,
                    tenant="victim",
                    prompt=prompts.next(VICTIM_PROMPT_TOKENS),
                    max_tokens=VICTIM_OUTPUT_TOKENS,
                )
            )
            await asyncio.sleep(VICTIM_THINKS_S)
        return timings
    finally:
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)


async def _flood(port: int, prompts: Prompts) -> None:
    while True:
        prompt = prompts.next(FLOOD_PROMPT_TOKENS)
        await _ask(port, tenant="flood", prompt=prompt, max_tokens=FLOOD_OUTPUT_TOKENS)


async def _ask(port: int, *, tenant: str, prompt: list[int], max_tokens: int) -> StreamTiming:
    body = {
        "model": "penstock-demo", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True
    }  # fmt: skip
    timing = await stream_completion(host="127.0.0.1", port=port, body=body, headers={"X-Tenant": tenant})
    if timing.error is not None:
        raise RuntimeError(timing.error)
    return timing


def measure_flood(policy: str, *, num_requests: int) -> float:
    """p99 of the victim's time to the first token beside the flood, over that alone."""
    prompts = Prompts()
    with running_cluster(_settings(policy)) as cluster:
        asyncio.run(
            measure_victim(cluster.port, prompts, num_requests=2, is_flooded=True)
        )  # warms every path up
        alone, flooded = (
            asyncio.run(
                measure_victim(cluster.port, prompts, num_requests=num_requests, is_flooded=is_flooded)
            )
            for is_flooded in (False, True)
        )
    columns = []
    for timings in (alone, flooded):
        ttfts_s = [timing.ttft_s for timing in timings]
        columns.append([1e3 * percentile(ttfts_s, percent) for percent in (50, 99)])
    (alone_p50, alone_p99), (flooded_p50, flooded_p99) = columns
    print(
        f"{policy:9} first token of the victim: alone p50 {alone_p50:.0f} p99 {alone_p99:.0f} ms,"
        f" flooded p50 {flooded_p50:.0f} p99 {flooded_p99:.0f} ms: {flooded_p99 / alone_p99:.2f}x"
    )
    return flooded_p99 / alone_p99


def _settings(policy: str) -> Mapping[str, Any]:
    mixed = {"replicas": 1, "scheduling_policy": policy, "max_num_batched_tokens": STEP_TOKENS}
    return {
        "gateway": {"tenant_header": "X-Tenant"},
        "pools": {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "mixed": mixed},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="finish within a minute; noisier")
    quick = parser.parse_args().quick
    vs_alone = measure_flood("fair", num_requests=6 if quick else 60)
    if not quick:
        measure_flood("priority", num_requests=10)
    swap_vs_recompute = measure_swap(num_turns=2, repeats=1 if quick else 3)
    write_report(
        "fairness",
        [
            Claim(name="victim_ttft_p99_vs_alone", value=vs_alone, unit="x", aim=1.5, better="lower"),
            Claim(name="swap_vs_recompute", value=swap_vs_recompute, unit="x", aim=1.2, better="higher"),
        ],
        keep=not quick,
    )


if __name__ == "__main__":
    main()
