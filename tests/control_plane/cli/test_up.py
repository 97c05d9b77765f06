import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from control_plane.cli.__main__ import app
from control_plane.cli.console import format_cores
from control_plane.config import PROJECT_ROOT

Launch = Callable[..., Any]


@pytest.mark.parametrize("on_terminal", [False, True])
def test_ctrl_c_stops_everything_in_order(launch: Launch, on_terminal: bool) -> None:
    cluster = launch(on_terminal=on_terminal)
    output = cluster.read_until("chunk.choices[0]")
    state = cluster.state()
    assert f"curl -N {state.http_url}/v1/chat/completions" in output
    assert len(cluster.process_ids) == 4
    cluster.interrupt()
    assert cluster.wait() == 0
    assert "Stopped. Logs are in" in cluster.output
    assert "Traceback" not in cluster.output
    cluster.assert_nothing_left()


def test_a_terminal_shows_a_table_with_progress_while_models_load(launch: Launch) -> None:
    cluster = launch(on_terminal=True, decode_0="never ready")
    output = cluster.read_until("loading weights")
    assert "process" in output
    cluster.read_until("━")
    cluster.state()
    cluster.interrupt()
    assert cluster.wait() == 130
    cluster.assert_nothing_left()


def test_without_a_terminal_there_are_plain_lines(launch: Launch) -> None:
    cluster = launch()
    output = cluster.read_until("chunk.choices[0]")
    assert "\x1b" not in output
    assert "decode-0     starting: loading weights\n" in output
    assert "decode-0     ready\n" in output


def test_a_failed_start_shows_the_end_of_the_log_and_leaves_nothing(launch: Launch) -> None:
    cluster = launch(decode_0="fails")
    assert cluster.wait() == 1
    assert "penstock: decode-0 ended with exit code 2 before it was ready" in cluster.output
    assert "  error: load_failed reason=no such checkpoint" in cluster.output
    assert "Traceback" not in cluster.output
    cluster.assert_nothing_left()


def test_a_second_ctrl_c_kills_what_does_not_stop(launch: Launch) -> None:
    cluster = launch("stop_timeout_s=600", prefill_0="ignores SIGTERM")
    cluster.read_until("chunk.choices[0]")
    cluster.state()
    cluster.interrupt()
    cluster.read_until("Stopping")
    cluster.interrupt()
    assert cluster.wait() == 0
    cluster.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_ways_to_be_asked_to_end_are_as_tidy(launch: Launch, number: signal.Signals) -> None:
    cluster = launch()
    cluster.read_until("chunk.choices[0]")
    cluster.state()
    os.kill(cluster.pid, number)
    assert cluster.wait() == 0
    cluster.assert_nothing_left()


def test_a_death_is_told_with_the_place_of_its_log(launch: Launch) -> None:
    cluster = launch()
    cluster.read_until("chunk.choices[0]")
    victim = cluster.state().processes[1]
    os.kill(victim.process_id.pid, signal.SIGKILL)
    cluster.read_until(f"restarting: was ended by SIGKILL; starts again in 0.5 s (log: {victim.log_path})")


def test_a_second_cluster_in_the_same_place_is_refused(launch: Launch) -> None:
    first = launch()
    first.read_until("chunk.choices[0]")
    second = launch()
    assert second.wait() == 1
    assert f"penstock: a cluster is running in {first.run_dir} (process {first.pid}, " in second.output
    first.state()
    first.interrupt()
    assert first.wait() == 0
    first.assert_nothing_left()


def test_a_busy_port_is_said_at_once(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        cluster = launch(f"gateway.port={port}")
        assert cluster.wait() == 1
    assert (
        f"penstock: gateway.port: cannot listen on 127.0.0.1:{port}: Address already in use" in cluster.output
    )
    assert "choose another with --port" in cluster.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "pools.decod.replicas=2"], "pools.decod is not a setting; did you mean decode?"),
        (["--port", "70000"], "gateway.port is 70000, but it must be between 0 and 65535"),
        (["--decode", "0"], "pools.decode.replicas and mixed.replicas are both 0"),
        (
            ["--quantize", "int8", "--set", "model.dtype=bfloat16"],
            "model.quantize is int8, which needs dtype float32, not bfloat16",
        ),
        (
            ["--kv-dtype", "int8"],
            "pools.prefill.device is cpu, but model.kv_dtype is int8, which only a GPU's kernels serve",
        ),
        (["--device", "gpu"], "pools.prefill.device is 'gpu', but it must be cpu, cuda or cuda:N"),
        (["--config", "/nonexistent.yaml"], "/nonexistent.yaml: cannot be read: No such file"),
        (["--model", "/nonexistent"], "model.path is /nonexistent, but there is no such directory"),
        (["--model", "/usr"], "model.path is /usr, but it has no config.json"),
    ],
)
def test_wrong_settings_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, run_dir: Path
) -> None:
    result = CliRunner().invoke(app, ["up", "--run-dir", str(run_dir), *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"penstock: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--detach"]])
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the key of the disk tier from"), ("c0ffee", "must hold 32 bytes in hex")],
)
def test_a_key_that_is_none_is_said_before_anything_starts(
    content: str | None, message: str, flags: list[str], run_dir: Path, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    if content is not None:
        key.write_text(content)
    command = ["up", "--run-dir", str(run_dir), "--set", f"kv.disk_key=file:{key}", *flags]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert result.stderr.startswith("penstock: kv.disk_key: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "c0ffee" not in result.stderr
    assert list(run_dir.iterdir()) == []


def test_a_variable_that_is_not_set_is_no_key(run_dir: Path) -> None:
    result = CliRunner().invoke(
        app, ["up", "--run-dir", str(run_dir), "--set", "kv.disk_key=env:PENSTOCK_NOPE"]
    )
    assert result.exit_code == 2
    assert "kv.disk_key: the environment has no variable PENSTOCK_NOPE" in result.stderr


def test_an_unknown_flag_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["up", "--porte", "1"])
    assert result.exit_code == 2
    assert "--port" in result.stderr


def test_help_imports_nothing_that_is_slow() -> None:
    script = "import sys, control_plane.cli.__main__; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    slow = {"grpc", "httpx", "fastapi", "numpy", "torch", "tokenizers", "rich.live", "psutil"}
    assert not slow & set(run.stdout.split())


@pytest.mark.parametrize(
    ("cores", "text"), [((), "any"), ((3,), "3"), ((0, 1, 2), "0-2"), ((0, 2, 3, 9), "0,2-3,9")]
)
def test_cores_are_shown_as_ranges(cores: tuple[int, ...], text: str) -> None:
    assert format_cores(cores) == text
