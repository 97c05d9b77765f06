"""The GPU's kernels without a GPU: interpreted against their references, and compiled for Hopper.

Each in a process of its own (`run.py`), because whether Triton interprets is settled when it is first imported.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def checks() -> list[str]:
    return [
        f"{path.stem}.{node.name.removeprefix('check_')}"
        for path in sorted((HERE / "checks").glob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
    ]


@cache
def runs() -> dict[str, subprocess.Popen[str]]:
    """Both at once: there are two cores, and each takes half a minute."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {
        mode: subprocess.Popen(
            [sys.executable, HERE / "run.py", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        )
        for mode, arguments in {"interpreted": [], "compiled": ["--compile"]}.items()
    }


@cache
def outcomes(mode: str) -> dict[str, str | None]:
    """What went wrong, or nothing, by name."""
    out, err = runs()[mode].communicate(timeout=110)
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert lines, err
    return {line["name"]: line["failure"] for line in lines}


@pytest.fixture(scope="module", autouse=True)
def _ends_what_it_began() -> Iterator[None]:
    yield
    for process in runs().values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", checks())
def test_interpreted(name: str) -> None:
    assert outcomes("interpreted")[name] is None, outcomes("interpreted")[name]


@pytest.mark.parametrize("operation", sorted(path.stem for path in (HERE / "checks").glob("*.py")))
def test_compiles_for_hopper(operation: str) -> None:
    compiled = {
        name: failure for name, failure in outcomes("compiled").items() if name.startswith(f"{operation}.")
    }
    assert compiled
    assert not any(compiled.values()), "\n".join(filter(None, compiled.values()))
