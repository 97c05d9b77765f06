import contextlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from control_plane.cli.__main__ import app
from control_plane.runtimes.stale import wait_gone
from control_plane.runtimes.state import RunState, lock, read_state

Launch = Callable[..., Any]


def down(run_dir: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["down", "--run-dir", str(run_dir), *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_stops_a_running_cluster(launch: Launch, run_dir: Path) -> None:
    cluster = launch()
    cluster.read_until("chunk.choices[0]")
    cluster.state()
    # The launcher is a child of the test: it is a zombie, which counts as gone, until it is waited for.
    assert down(run_dir) == f"Stopped the cluster in {run_dir}.\n"
    cluster.assert_nothing_left()
    assert cluster.wait() == 0


def test_without_a_cluster_there_is_nothing_to_do(run_dir: Path) -> None:
    assert down(run_dir) == f"Nothing runs in {run_dir}.\n"
    assert down(run_dir / "missing") == f"Nothing runs in {run_dir / 'missing'}.\n"
    assert list(run_dir.iterdir()) == []


def test_kills_a_launcher_that_does_not_stop_in_time(launch: Launch, run_dir: Path) -> None:
    cluster = launch("stop_timeout_s=600", decode_0="ignores SIGTERM")
    cluster.read_until("chunk.choices[0]")
    cluster.state()
    assert down(run_dir, "--timeout", "0.5").startswith("Killed: it did not stop within 0.5 s")
    cluster.assert_nothing_left()


def test_waits_for_the_last_threads_of_a_launcher_that_was_killed(launch: Launch, run_dir: Path) -> None:
    cluster = launch()
    cluster.read_until("chunk.choices[0]")
    cluster.state()
    os.kill(cluster.pid, signal.SIGKILL)
    cluster.wait()
    held = contextlib.ExitStack()
    held.enter_context(lock(run_dir))
    last_thread = threading.Timer(0.1, held.close)
    last_thread.start()
    assert "removed what it left" in down(run_dir)
    last_thread.join()
    cluster.assert_nothing_left()


def test_clears_up_after_a_launcher_that_was_killed(launch: Launch, run_dir: Path) -> None:
    cluster = launch()
    cluster.read_until("chunk.choices[0]")
    cluster.state()
    os.kill(cluster.pid, signal.SIGKILL)
    assert wait_gone(list(cluster.process_ids), timeout_s=10)
    assert read_state(run_dir) is not None
    assert "removed what it left" in down(run_dir)
    cluster.assert_nothing_left()


def test_a_recycled_pid_is_not_killed(launch: Launch, run_dir: Path) -> None:
    """The state names this very test as its launcher, but with another start time: it is somebody else."""
    cluster = launch()
    cluster.read_until("chunk.choices[0]")
    state: RunState = cluster.state()
    cluster.interrupt()
    cluster.wait()
    stranger = type(state.launcher)(os.getpid(), state.launcher.start_ticks + 1)
    type(state)(
        **{name: getattr(state, name) for name in RunState.__dataclass_fields__ if name != "launcher"},
        launcher=stranger,
    ).write(run_dir)
    assert "removed what it left" in down(run_dir)


def test_a_damaged_state_file_is_said_plainly(run_dir: Path) -> None:
    (run_dir / "state.json").write_text('{"version": 1, "processes": [')
    result = CliRunner().invoke(app, ["down", "--run-dir", str(run_dir)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"penstock: {run_dir / 'state.json'} is damaged")
    assert result.stderr.count("\n") == 1
