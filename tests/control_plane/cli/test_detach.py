from pathlib import Path

from typer.testing import CliRunner

from control_plane.cli.__main__ import app
from control_plane.runtimes.state import lock


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
