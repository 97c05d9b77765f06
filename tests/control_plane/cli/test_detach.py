import os
import select
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from control_plane.cli.__main__ import app
from control_plane.config import PROJECT_ROOT
from control_plane.runtimes.state import lock, read_state

DEADLINE_S = 60.0


def test_a_start_that_fails_is_told_with_the_reason_and_leaves_nothing(run_dir: Path, tmp_path: Path) -> None:
    """The real control process refuses a model without a tokenizer."""
    (tmp_path / "config.json").write_text("{}")
    flags = [
        "--detach",
        "--prefill",
        "0",
        "--model",
        str(tmp_path),
        "--port",
        "0",
        "--grpc-port",
        "0",
        "--run-dir",
        str(run_dir),
    ]
    result = CliRunner().invoke(app, ["up", *flags])
    assert result.exit_code == 1
    assert "penstock: the cluster did not start:\n" in result.stderr
    assert "before it was ready" in result.stderr
    assert result.stdout.count("control      starting\n") == 1
    assert "starting" not in result.stderr, "its progress is told twice"
    assert "Traceback" not in result.stderr
    assert {path.name for path in run_dir.iterdir()} == {"logs"}


def test_a_taken_run_directory_is_refused_before_the_log_is_touched(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with lock(run_dir):
        result = CliRunner().invoke(
            app, ["up", "--detach", "--model", str(tmp_path), "--run-dir", str(run_dir)]
        )
    assert result.exit_code == 1
    assert result.stderr.startswith(f"penstock: a cluster is running in {run_dir}")
    assert list(run_dir.iterdir()) == []


def test_who_reads_what_a_start_says_comes_to_its_end_while_the_cluster_runs(run_dir: Path) -> None:
    """A pipe ends once nobody can write to it any more: the cluster must have inherited neither end."""
    command = [
        sys.executable, "-m", "control_plane.cli", "up", "--detach", "--prefill", "0", "--port", "0",
        "--grpc-port", "0", "--run-dir", str(run_dir),
    ]  # fmt: skip
    reading, writing = os.pipe()
    try:
        started = subprocess.run(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            pass_fds=[writing], timeout=DEADLINE_S, check=False, cwd=PROJECT_ROOT,
        )  # fmt: skip
        os.close(writing)
        assert started.returncode == 0, started.stdout
        state = read_state(run_dir)
        assert state is not None
        assert state.launcher.is_alive()
        assert select.select([reading], [], [], 0)[0], "the cluster holds a pipe of its caller"
        assert os.read(reading, 1) == b""
    finally:
        os.close(reading)
        CliRunner().invoke(app, ["down", "--run-dir", str(run_dir)])
