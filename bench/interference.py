"""What a long prefill does to a running decode: p99 inter-token latency, disaggregated against mixed, same cores.

Both topologies have two workers of one thread, each on its own core: a prefill and a decode worker, or two mixed
ones. A few requests decode all the time; after a quiet phase, long prompts arrive one after the other.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cluster import running_cluster
from bench.load import StreamTiming, percentile, random_prompt, stream_completion
from bench.model import write_random_model
from bench.report import Claim, write_report

PROMPT_TOKENS = 1536
VOCAB_SIZE = 2560
TOPOLOGIES: Mapping[str, Mapping[str, Any]] = {
    "disaggregated": {"prefill": {"replicas": 1}, "decode": {"replicas": 1}, "mixed": {"replicas": 0}},
    "mixed": {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "mixed": {"replicas": 2}},
}


@dataclass(frozen=True, slots=True)
class Phase:
    """Gaps between tokens of the running decodes, in seconds."""

    itl_s: list[float]

    @property
    def p50_ms(self) -> float:
        return 1e3 * percentile(self.itl_s, 50)

    @property
    def p99_ms(self) -> float:
        return 1e3 * percentile(self.itl_s, 99)


@dataclass(frozen=True, slots=True)
class Measurement:
    quiet: Phase
    loaded: Phase
    num_prefills: int

    @property
    def p99_change_percent(self) -> float:
        return 100 * (self.loaded.p99_ms / self.quiet.p99_ms - 1)


async def measure(port: int, *, num_prefills: int, decode_tokens: int) -> Measurement:
    """One decode runs through both phases: first alone, then beside the prefills."""

    async def send(seed: int, prompt_tokens: int, max_tokens: int) -> StreamTiming:
        prompt = random_prompt(seed=seed, num_tokens=prompt_tokens, vocab_size=VOCAB_SIZE)
        body = {
            "model": "bench",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        timing = await stream_completion(host="127.0.0.1", port=port, body=body)
        if timing.error is not None:
            raise RuntimeError(timing.error)
        return timing

    await send(1, PROMPT_TOKENS, 8)  # warm-up of every path
    quiet = await send(2, 32, decode_tokens)
    decode = asyncio.ensure_future(send(3, 32, decode_tokens))
    windows = []
    for index in range(num_prefills):
        if decode.done():
            break
        timing = await send(100 + index, PROMPT_TOKENS, 1)
        windows.append((timing.started_s, timing.event_times_s[-1]))
    loaded = await decode
    # Only the gaps during which a prefill was under way count as loaded.
    gaps = [
        gap
        for at_s, gap in zip(loaded.event_times_s[1:], loaded.itl_s, strict=True)
        if any(start <= at_s and at_s - gap <= end for start, end in windows)
    ]
    return Measurement(Phase(quiet.itl_s), Phase(gaps), len(windows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="finish within a minute; noisier")
    quick = parser.parse_args().quick
    num_prefills, decode_tokens = (4, 300) if quick else (24, 1500)
    changes = {}
    with tempfile.TemporaryDirectory(prefix="penstock-") as directory:
        model = write_random_model(Path(directory), hidden_size=512, num_layers=8)
        columns = ("quiet p50", "quiet p99", "loaded p50", "loaded p99", "p99 change")
        print(f"{'topology':14}", *(f"{column:>11}" for column in columns))
        for name, pools in TOPOLOGIES.items():
            settings = {"model": {"name": "bench", "path": str(model)}, "pools": dict(pools)}
            with running_cluster(settings) as cluster:
                found = asyncio.run(
                    measure(cluster.port, num_prefills=num_prefills, decode_tokens=decode_tokens)
                )
            changes[name] = found.p99_change_percent
            quiet, loaded = found.quiet, found.loaded
            print(
                f"{name:14} {quiet.p50_ms:8.1f} ms {quiet.p99_ms:8.1f} ms {loaded.p50_ms:8.1f} ms "
                f"{loaded.p99_ms:8.1f} ms {changes[name]:9.1f} %  ({found.num_prefills} prefills)"
            )
    write_report(
        "interference",
        [
            Claim(
                name="disaggregated_itl_p99_change",
                value=changes["disaggregated"],
                unit="%",
                aim=20,
                better="lower",
            ),
            Claim(name="mixed_itl_p99_change", value=changes["mixed"], unit="%", aim=20, better="higher"),
        ],
        keep=not quick,
    )


if __name__ == "__main__":
    main()
