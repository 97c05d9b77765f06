"""Time to first token of a 4k-token context that another process holds, by the bandwidth between the two.

    make bench BENCH=kv_load [ARGS=--quick]

Two worker processes, one core each, joined by a link of 100 Mbit/s, 1 and 5 Gbit/s (bench/network.py). The context is
computed again, fetched raw, as 8-bit, at each level of CacheGen, and adaptively: as the worker's controller decides,
with an objective that nothing keeps, so that it goes for the soonest. The ways alternate, so that other load on the
machine meets all; each figure is a median. Control messages do not pass the link: a few kilobytes.

Then the bandwidth jumps while a load is on its way, up and down; a way that cannot follow pays for it.
"""

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from bench.kv_load_pair import Pair, running_pair
from bench.kv_load_puller import ADAPTIVE
from bench.model import DEMO_MODEL
from bench.report import Claim, write_report
from kvstore.codec.levels import INT8, NUM_CACHEGEN_LEVELS, RAW
from tools.demo_corpus import load_documents

# 250 full blocks and a rest, in the model's 4096 positions.
PROMPT_TOKENS = 4008
RECOMPUTE = "recompute"
LINKS_MBIT = {"100m": 100.0, "1g": 1000.0, "5g": 5000.0}
MODES: dict[str, str | None] = {
    RECOMPUTE: None,
    "raw": str(RAW),
    "8-bit": str(INT8),
    **{f"cachegen-{level}": str(level) for level in range(1, NUM_CACHEGEN_LEVELS + 1)},
    ADAPTIVE: ADAPTIVE,
}
AIM_VS_BEST_OTHER = 1.1
AIM_SPEEDUP = 2.7


@dataclass(frozen=True, slots=True)
class Jump:
    """The bandwidth changes `after_s` into the load."""

    name: str
    from_mbit: float
    to_mbit: float
    after_s: float


# A fifth of what a raw load takes there, of what CacheGen takes.
JUMPS = (Jump("collapse", 1000, 20, 0.02), Jump("recovery", 20, 1000, 0.15))

Medians = dict[str, float]


async def measure(pair: Pair, *, repeat: int, jump: Jump | None = None) -> Medians:
    """Seconds, by mode."""
    samples: dict[str, list[float]] = {name: [] for name in MODES}
    for turn in range(repeat + 1):
        for name, mode in MODES.items():
            seconds = await (pair.time_to_first_token(mode) if jump is None else _through(pair, mode, jump))
            if turn > 0:  # the first is warm-up: estimates, caches, connections
                samples[name].append(seconds)
    return {name: statistics.median(values) for name, values in samples.items()}


async def _through(pair: Pair, mode: str | None, jump: Jump) -> float:
    async def change() -> None:
        await asyncio.sleep(jump.after_s)
        await asyncio.to_thread(pair.link.set_rate, jump.to_mbit)

    pair.link.set_rate(jump.from_mbit)
    changing = asyncio.create_task(change())
    try:
        return await pair.time_to_first_token(mode)
    finally:
        await changing


def context(model: Path, num_tokens: int) -> list[int]:
    """Text that the demo model was not trained on."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    token_ids: list[int] = []
    for document in load_documents(held_out=True):
        token_ids += tokenizer.encode(document).ids
        if len(token_ids) >= num_tokens:
            return token_ids[:num_tokens]
    raise RuntimeError(f"the held-out text has {len(token_ids)} tokens, not {num_tokens}")


def show(title: str, medians: Medians) -> None:
    print(f"\n{title}")
    for name, seconds in medians.items():
        print(f"  {name:12} {1e3 * seconds:8.1f} ms")


def best_other(medians: Medians) -> float:
    return min(seconds for name, seconds in medians.items() if name != ADAPTIVE)


def claims(by_link: dict[str, Medians]) -> list[Claim]:
    found = [
        Claim(
            name=f"adaptive_vs_best_other_{link}",
            value=medians[ADAPTIVE] / best_other(medians),
            unit="x",
            aim=AIM_VS_BEST_OTHER,
            better="lower",
        )
        for link, medians in by_link.items()
    ]
    middle = by_link["1g"]
    speedup = min(middle[RECOMPUTE], middle["8-bit"]) / middle[ADAPTIVE]
    return [*found, Claim(name="speedup_mid", value=speedup, unit="x", aim=AIM_SPEEDUP, better="higher")]


async def run(model: Path, *, repeat: int) -> dict[str, Medians]:
    prompt = context(model, PROMPT_TOKENS)
    with tempfile.TemporaryDirectory(prefix="penstock-") as directory:
        async with running_pair(
            Path(directory), model=model, prompt=prompt, max_level=NUM_CACHEGEN_LEVELS
        ) as pair:
            kv_mib = _kv_bytes(pair) / 2**20
            print(f"{pair.link.name}; {PROMPT_TOKENS} tokens, {kv_mib:.1f} MiB of KV")
            await pair.hold()
            by_link = {}
            for name, mbit_s in LINKS_MBIT.items():
                pair.link.set_rate(mbit_s)
                by_link[name] = await measure(pair, repeat=repeat)
                show(f"{mbit_s:g} Mbit/s", by_link[name])
            for jump in JUMPS:
                medians = await measure(pair, repeat=repeat, jump=jump)
                show(
                    f"{jump.name}: {jump.from_mbit:g} Mbit/s, {jump.to_mbit:g} after {jump.after_s:g} s",
                    medians,
                )
            return by_link


def _kv_bytes(pair: Pair) -> int:
    layout = pair.source.worker.model.layout
    item_bytes = 4 if layout.dtype == "float32" else 2
    per_token = 2 * layout.num_layers * layout.num_kv_heads * layout.head_dim * item_bytes
    return per_token * (len(pair.prompt) // layout.block_size_tokens * layout.block_size_tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=7, help="measurements of each way and link")
    parser.add_argument(
        "--model", type=Path, default=DEMO_MODEL, help="a checkpoint with the demo's tokenizer"
    )
    parser.add_argument("--quick", action="store_true", help="2 measurements of each")
    options = parser.parse_args(arguments)
    by_link = asyncio.run(run(options.model, repeat=2 if options.quick else options.repeat))
    write_report("kv_load", claims(by_link))


if __name__ == "__main__":
    main()
