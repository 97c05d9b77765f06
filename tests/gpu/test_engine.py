"""The engines with Triton's kernels interpreted, in a process of its own (`run.py`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.workers.engine.bare import BARE

HERE = Path(__file__).resolve().parent


def test_whole_answers_with_interpreted_kernels_are_those_of_their_formulas() -> None:
    run = subprocess.run(
        [sys.executable, HERE / "run.py", "--engine"],
        capture_output=True, text=True, timeout=100, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert lines, run.stderr
    assert not [line["failure"] for line in lines if line["failure"]], "\n".join(
        line["failure"] for line in lines if line["failure"]
    )


def test_the_served_engine_is_checked_where_nothing_but_torch_and_triton_is_installed() -> None:
    code = (
        # In place of inputs.py, which has torch import its compiler; that looks for numpy by itself.
        "import sys, types\n"
        "sys.modules['inputs'] = types.SimpleNamespace(BLOCK=16, DEVICE='cpu', IS_INTERPRETED=True)\n"
        "import engine_checks.served as served\n"
        "print(served.answers(served.plain_engine('qwen3', device='cpu', attention='reference')))"
    )
    paths = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
    runs = [
        subprocess.run(
            [sys.executable, "-c", prelude + code], capture_output=True, text=True, timeout=60, check=False,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths},
        )
        for prelude in (BARE, "")
    ]  # fmt: skip
    assert runs[0].stdout == runs[1].stdout != "", runs[0].stderr
