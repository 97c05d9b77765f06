"""Runs the checks of the GPU's kernels under any Python with torch and triton, and nothing else installed.

    python3 tests/gpu/run.py              on the GPU there is; else interpreted by Triton on the CPU
    python3 tests/gpu/run.py --compile    compiled for Hopper, where no GPU is needed
    python3 tests/gpu/run.py --engine     not the kernels one by one, but the engines on small models
    ... run.py WORD                       only what has WORD in its name
    PENSTOCK_SEED=7 ... run.py            with the inputs of an earlier run, whose seed it printed

A check is a function `check_...` of a file in `checks` or `engine_checks`; what is compiled stands in SHIPPED of the
former. One JSON line for each, with what went wrong or null; the exit status says whether anything did.
"""

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent


def checks(folder: str, module_names: list[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    for name in module_names:
        module = importlib.import_module(f"{folder}.{name}")
        for attribute, check in vars(module).items():
            if attribute.startswith("check_"):
                yield f"{name}.{attribute.removeprefix('check_')}", check


def compilations(module_names: list[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    from hopper import compile_for_hopper

    for name in module_names:
        for shipped in importlib.import_module(f"checks.{name}").SHIPPED:
            yield f"{name}.{shipped.name}", lambda shipped=shipped: compile_for_hopper(shipped)


def run(name: str, check: Callable[[], object], *, seed: int) -> bool:
    start, figures, failure = time.perf_counter(), None, None
    try:
        figures = check()
    except Exception:  # noqa: BLE001 - whatever goes wrong is the result
        failure = traceback.format_exc(limit=-3)
    outcome = {"name": name, "failure": failure, "seconds": round(time.perf_counter() - start, 2)}
    print(json.dumps(outcome | {"figures": figures, "seed": seed}), flush=True)
    return failure is None


def main(arguments: list[str]) -> int:
    sys.path[:0] = [str(HERE), str(HERE.parent.parent)]
    os.environ.setdefault("TRITON_CACHE_DIR", str(HERE.parent.parent / "build" / "triton"))
    compiles = "--compile" in arguments
    folder = "engine_checks" if "--engine" in arguments else "checks"
    words = [argument for argument in arguments if not argument.startswith("--")]
    import torch

    if not compiles and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    from inputs import SEED

    module_names = sorted(path.stem for path in (HERE / folder).glob("*.py"))
    found = compilations(module_names) if compiles else checks(folder, module_names)
    chosen = [(name, check) for name, check in found if all(word in name for word in words)]
    results = [run(name, check, seed=SEED) for name, check in chosen]
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
