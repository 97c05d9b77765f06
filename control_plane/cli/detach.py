"""`penstock up --detach`: the launcher in a session of its own; this process only watches it start."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import typer

from control_plane.cli.console import Console, announcement
from control_plane.cli.failures import is_error, say_error
from control_plane.cli.gateways import warn_without_redis
from control_plane.cli.up import INTERRUPTED, check_disk_key, check_model
from control_plane.config import PROJECT_ROOT, ClusterConfig
from control_plane.runtimes.log_tail import last_lines
from control_plane.runtimes.ports import with_free_ports
from control_plane.runtimes.state import RunState, lock, read_state
from control_plane.strict_yaml import dump

_POLL_S = 0.1
_MAX_LINES = 40  # of what the launcher says: an error, and with it the end of another log
LAUNCHER_LOG = "launcher.log"


def start_detached(config: ClusterConfig) -> None:
    """Returns once the cluster serves. Raises typer.Exit with the launcher's own exit code if it never does."""
    check_model(config.model.path)
    check_disk_key(config)
    with lock(config.run_dir):  # what will surely fail fails here, where somebody reads it
        with_free_ports(config)
    log_path = config.run_dir / "logs" / LAUNCHER_LOG
    log_path.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(dump(config))
        file.flush()
        launcher = _spawn(Path(file.name), log_path)
        try:
            state = _watch(launcher, config)
        except KeyboardInterrupt as e:
            launcher.send_signal(signal.SIGTERM)
            launcher.wait()
            raise typer.Exit(INTERRUPTED) from e
    if state is None:
        say_error("the cluster did not start:")
        print("\n".join(_reason(last_lines(log_path, num_lines=_MAX_LINES))), file=sys.stderr)
        raise typer.Exit(launcher.returncode or 1)
    print(announcement(state), flush=True)
    warn_without_redis(state.gateways)
    where = "" if config.run_dir == Path.cwd() / "run" else f" --run-dir {shlex.quote(str(config.run_dir))}"
    print(f"penstock status{where} shows it, penstock down{where} stops it.")


def _spawn(config_path: Path, log_path: Path) -> "subprocess.Popen[bytes]":
    python_path = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))
    with log_path.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "control_plane.cli", "up", "--config", str(config_path)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": python_path},
        )  # fmt: skip


def _reason(lines: list[str]) -> list[str]:
    """From the launcher's first error on: its progress has been shown. All, where it died without one."""
    first = next((number for number, line in enumerate(lines) if is_error(line)), 0)
    return lines[first:]


def _watch(launcher: "subprocess.Popen[bytes]", config: ClusterConfig) -> RunState | None:
    """The state once it is ready; None if the launcher ends before."""
    with Console(config) as console:
        while launcher.poll() is None:
            state = read_state(config.run_dir)
            if state is not None and state.launcher.pid == launcher.pid:
                console.show(state)
                if state.ready:
                    return state
            time.sleep(_POLL_S)
    return None
