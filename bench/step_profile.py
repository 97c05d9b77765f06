"""Where the time of a step goes, operation by operation, in fp32 and int8: the table of docs/performance.md.

    python -m bench.step_profile [--quick]

The model and steps of `bench.engine`: decode at batch 1 and 32 after prompts of 128 tokens, prefill of 512. Each
compiled task runs and is timed by itself, which adds 1 to 2 microseconds to it; means over the steps of all rounds, in
which the two alternate. What is outside of tasks (batches, the embedding, sampling, Python) is the rest.
"""

import argparse
import importlib
import pkgutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import kernels
from bench.engine import NUM_THREADS, PREFILL_TOKENS, make_checkpoint, prefilled, random_prompts, step
from kernels.team import Call, Program
from workers.engine.engine import Engine, load_engine
from workers.quantization import CPU_QUANTIZATIONS

# (name, batch of decode or 0 for prefill, steps of a round)
STEPS = (("decode, batch 1", 1, 32), ("decode, batch 32", 32, 16), ("prefill 512", 0, 1))
# Products by inputs and outputs.
_PRODUCTS = {
    (1024, 1536): "queries, keys, values", (1024, 1024): "attention output", (1024, 5632): "gate and up",
    (2816, 1024): "down", (1024, 32000): "lm_head",
}  # fmt: skip
_OTHERS = {
    "int8_rows": "rows to int8", "paged_attention": "attention", "rotary": "rotary, KV write",
    "rms_norm": "norms", "silu_mul": "SiLU and gate",
}  # fmt: skip
_REST = "the rest"
Seconds = dict[str, float]
_ORDER = (*_PRODUCTS.values(), *_OTHERS.values(), _REST)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round")
    num_rounds = 1 if parser.parse_args().quick else 5
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoint(Path(directory))
        engines = [
            load_engine(model_path=Path(directory), quantize=quantize, num_pages=640, num_threads=NUM_THREADS)
            for quantize in CPU_QUANTIZATIONS
        ]
    columns: dict[str, Seconds] = {}
    for name, batch, num_steps in STEPS:
        steps = [next_step(engine, batch, 1 + num_rounds * num_steps) for engine in engines]
        for compute in steps:
            compute()  # warm-up
        rounds = [[timed(compute, num_steps) for compute in steps] for _ in range(num_rounds)]
        for kind, found in zip(("fp32", "int8"), zip(*rounds, strict=True), strict=True):
            columns[f"{name}, {kind}"] = {
                label: sum(one[label] for one in found) / num_rounds for label in _ORDER
            }
    print_table(columns)


def next_step(engine: Engine, batch: int, num_steps: int) -> Callable[[], object]:
    """Computes a step each time it is called: of decode, up to `num_steps` of them, or with batch 0 of prefill."""
    if batch == 0:
        prompts = random_prompts(1, PREFILL_TOKENS)
        return lambda: prefilled(engine, prompts, 1)
    requests = prefilled(engine, random_prompts(batch, 128), num_steps + 1)
    return lambda: step(engine, requests)


def timed(compute: Callable[[], object], num_times: int) -> Seconds:
    """Of each operation in a step."""
    start_s = time.perf_counter()
    with timed_tasks() as seconds:
        for _ in range(num_times):
            compute()
    seconds[_REST] = time.perf_counter() - start_s - sum(seconds.values())
    return {label: seconds[label] / num_times for label in _ORDER}


@contextmanager
def timed_tasks() -> Iterator[defaultdict[str, float]]:
    """Seconds of every operation that runs meanwhile."""
    seconds: defaultdict[str, float] = defaultdict(float)
    names, run = _task_names(), Program.run

    def run_timed(program: Program, start: int = 0, stop: int | None = None) -> None:
        for number, call in enumerate(program._calls[start:stop], start):
            start_s = time.perf_counter()
            run(program, number, number + 1)
            seconds[_operation(names, call)] += time.perf_counter() - start_s

    with patch.object(Program, "run", run_timed):
        yield seconds


def _task_names() -> dict[int, str]:
    """Address of a compiled task -> the kernel's module."""
    modules = [
        importlib.import_module(f"kernels.{found.name}") for found in pkgutil.iter_modules(kernels.__path__)
    ]
    return {
        value.address: module.__name__.removeprefix("kernels.")
        for module in modules
        for value in vars(module).values()
        if hasattr(value, "address")
    }


def _operation(names: dict[int, str], call: Call) -> str:
    name = names[call.task]
    if name in ("linear", "int8_linear"):
        return _PRODUCTS[int(call.arguments[-2]), int(call.arguments[-1])]
    return _OTHERS[name]


def print_table(columns: dict[str, Seconds]) -> None:
    """In markdown: milliseconds of a step, and the share of it."""
    totals = [sum(one.values()) for one in columns.values()]
    print(f"| milliseconds of a step | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name in _ORDER:
        cells = [
            f"{1e3 * one[name]:.2f} ({one[name] / total:.0%})"
            for one, total in zip(columns.values(), totals, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"| all | {' | '.join(f'{1e3 * total:.2f}' for total in totals)} |")


if __name__ == "__main__":
    main()
