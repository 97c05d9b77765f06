"""The offline engine with Triton's kernels interpreted, in a process of its own (`run.py`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

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
