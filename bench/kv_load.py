"""Time to first token of a 4k-token context that another process holds, by the bandwidth between the two.

    make bench BENCH=kv_load [ARGS=--quick]

Two worker processes, one core each, joined by a link of 100 Mbit/s, 1 and 5 Gbit/s (bench/network.py). The context is
computed again, fetched raw, as 8-bit, at each level of CacheGen, and adaptively: as the worker's controller decides,
with an objective that nothing keeps, so that it goes for the soonest. The ways alternate, so that other load on the
machine meets all; each figure is a median. Control messages do not pass the link: a few kilobytes.

A source codes a chunk once and keeps it coded, so all but the first pull of a context find it so: the tables are of
these. What the first pull takes, which waits for the encoder, is listed for 8 bits and adaptively at 1 Gbit/s.

All of it for two models (bench/kv_load_models.py). `speedup_mid` is the large one's: of the shipped one's few
megabytes a load's own costs are most. `adaptive_vs_best_other` is the worse of the two.

Then the bandwidth jumps while a load of the shipped model is on its way, up and down; a way that cannot follow pays.
"""

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from bench.kv_load_models import ContextModel, large_model, shipped_model
from bench.kv_load_pair import Pair, running_pair
from bench.kv_load_puller import ADAPTIVE
from bench.report import Claim, write_report
from kvstore.codec.levels import INT8, NUM_CACHEGEN_LEVELS, RAW
from tools.demo_corpus import load_documents

# 250 full blocks and a rest, in the model's 4096 positions.
PROMPT_TOKENS = 4008
RECOMPUTE = "recompute"
EIGHT_BIT = "8-bit"
MIDDLE = "1g"
LINKS_MBIT = {"100m": 100.0, "1g": 1000.0, "5g": 5000.0}
MODES: dict[str, str | None] = {
    RECOMPUTE: None,
    "raw": str(RAW),
    EIGHT_BIT: str(INT8),
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


async def measure_first(pair: Pair, *, repeat: int) -> Medians:
    """Seconds of pulls that find nothing coded, by mode."""
    samples: dict[str, list[float]] = {EIGHT_BIT: [], ADAPTIVE: []}
    for _ in range(repeat):
        for name, values in samples.items():
            await pair.hold_anew()
            values.append(await pair.time_to_first_token(MODES[name]))
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


def speedup(medians: Medians) -> float:
    return min(medians[RECOMPUTE], medians[EIGHT_BIT]) / medians[ADAPTIVE]


def claims(shipped: dict[str, Medians], large: dict[str, Medians]) -> list[Claim]:
    found = [
        Claim(
            name=f"adaptive_vs_best_other_{link}",
            value=max(of_one[link][ADAPTIVE] / best_other(of_one[link]) for of_one in (shipped, large)),
            unit="x",
            aim=AIM_VS_BEST_OTHER,
            better="lower",
        )
        for link in LINKS_MBIT
    ]
    value = speedup(large[MIDDLE])
    return [*found, Claim(name="speedup_mid", value=value, unit="x", aim=AIM_SPEEDUP, better="higher")]


async def run(model: ContextModel, *, repeat: int, jumps: Sequence[Jump] = ()) -> dict[str, Medians]:
    prompt = context(model.path, PROMPT_TOKENS)
    with tempfile.TemporaryDirectory(prefix="penstock-") as directory:
        async with running_pair(
            Path(directory), model=model.path, prompt=prompt, max_level=NUM_CACHEGEN_LEVELS
        ) as pair:
            kv_mib = model.kv_bytes_per_token * PROMPT_TOKENS / 2**20
            print(f"\n{model.title}\n{pair.link.name}; {PROMPT_TOKENS} tokens, {kv_mib:.1f} MiB of KV")
            await pair.hold()
            by_link = {}
            for name, mbit_s in LINKS_MBIT.items():
                pair.link.set_rate(mbit_s)
                by_link[name] = await measure(pair, repeat=repeat)
                show(f"{mbit_s:g} Mbit/s, speedup {speedup(by_link[name]):.2f}", by_link[name])
            for jump in jumps:
                medians = await measure(pair, repeat=repeat, jump=jump)
                show(
                    f"{jump.name}: {jump.from_mbit:g} Mbit/s, {jump.to_mbit:g} after {jump.after_s:g} s",
                    medians,
                )
            pair.link.set_rate(LINKS_MBIT[MIDDLE])
            show(
                f"{LINKS_MBIT[MIDDLE]:g} Mbit/s, nothing coded before",
                await measure_first(pair, repeat=repeat),
            )
            return by_link


async def run_all(*, repeat: int, repeat_large: int) -> list[Claim]:
    shipped = await run(shipped_model(), repeat=repeat, jumps=JUMPS)
    with tempfile.TemporaryDirectory(prefix="penstock-model-") as directory:
        large = await run(large_model(Path(directory)), repeat=repeat_large)
    return claims(shipped, large)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=7, help="measurements of each way and link")
    parser.add_argument("--repeat-large", type=int, default=3, help="the same for the large model")
    parser.add_argument("--quick", action="store_true", help="2 measurements of each")
    options = parser.parse_args(arguments)
    repeat, repeat_large = (2, 2) if options.quick else (options.repeat, options.repeat_large)
    found = asyncio.run(run_all(repeat=repeat, repeat_large=repeat_large))
    write_report("kv_load", found, keep=not options.quick)


if __name__ == "__main__":
    main()
