import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from control_plane.config import PROJECT_ROOT
from control_plane.runtimes.process_id import ProcessId, identify
from control_plane.runtimes.stale import wait_gone
from control_plane.runtimes.state import RunState, read_state

LAUNCHER = str(Path(__file__).with_name("launcher.py"))
ON_TERMINAL = str(Path(__file__).with_name("on_terminal.py"))
DEADLINE_S = 30.0


@pytest.fixture(autouse=True, scope="session")
def hears_ctrl_c() -> None:
    """A shell has what it starts in the background ignore Ctrl-C, and everything started by that inherits it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Launched:
    """A launcher on a terminal of its own, or with its output in a pipe."""

    def __init__(
        self, run_dir: Path, overrides: list[str], behaviours: dict[str, str], *, on_terminal: bool
    ) -> None:
        self.run_dir = run_dir
        self.output = ""
        arguments = [sys.executable, LAUNCHER, json.dumps(behaviours), f"run_dir={run_dir}", *overrides]
        self._reading, its_end = pty.openpty() if on_terminal else os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, ON_TERMINAL, *arguments] if on_terminal else arguments,
            stdin=its_end if on_terminal else subprocess.DEVNULL, stdout=its_end, stderr=its_end,
            cwd=PROJECT_ROOT, env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "TERM": "xterm", "COLUMNS": "120"},
            start_new_session=on_terminal,
        )  # fmt: skip
        os.close(its_end)
        self.pid = pid = self._process.pid
        identity = identify(pid)
        assert identity is not None
        self.identity = identity
        self.process_ids: set[ProcessId] = {identity}
        self._on_terminal = on_terminal

    def read_until(self, text: str) -> str:
        """All output so far, once it contains `text`."""
        return self._read(lambda: text in self.output, f"{text!r} did not appear")

    def wait(self) -> int:
        """The exit code, once all output is read."""
        if self._process.returncode is None:
            self._read(lambda: False, "it did not end")
            os.close(self._reading)
        return self._process.wait()

    def _read(self, done: Callable[[], bool], failure: str) -> str:
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            if not select.select([self._reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{failure} within {DEADLINE_S} s; the output was:\n{self.output}")
            try:
                data = os.read(self._reading, 65536)
            except OSError:  # what a terminal answers once its other side is closed
                data = b""
            if not data:
                break
            self.output += data.decode(errors="replace")
        return self.output

    def state(self) -> RunState:
        state = read_state(self.run_dir)
        assert state is not None
        self.process_ids |= {process.process_id for process in state.processes if process.process_id}
        return state

    def interrupt(self) -> None:
        if self._on_terminal:
            os.write(self._reading, b"\x03")
        else:
            os.kill(self.pid, signal.SIGINT)

    def assert_nothing_left(self) -> None:
        assert wait_gone(list(self.process_ids), timeout_s=5)
        assert [path.name for path in self.run_dir.iterdir()] in ([], ["logs"])


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """Short, for Unix sockets: pytest's own temporary directories are not."""
    path = Path(tempfile.mkdtemp(prefix="penstock-test-"))
    yield path
    shutil.rmtree(path)


Launch = Callable[..., Launched]


@pytest.fixture
def launch(run_dir: Path, tmp_path: Path) -> Iterator[Launch]:
    """Starts a cluster of fake processes: a prefill and a decode worker on free ports."""
    launched: list[Launched] = []
    (tmp_path / "config.json").write_text("{}")

    def start(*overrides: str, on_terminal: bool = False, **behaviours: str) -> Launched:
        settings = [
            "gateway.port=0",
            "gateway.grpc_port=0",
            "kv.disk_tier_bytes=0",
            f"model.path={tmp_path}",
            "model.name=fake",
            *overrides,
        ]
        named = {name.replace("_", "-"): behaviour for name, behaviour in behaviours.items()}
        launched.append(Launched(run_dir, settings, named, on_terminal=on_terminal))
        return launched[-1]

    yield start
    for one in launched:
        one.identity.send(signal.SIGKILL)
        one.wait()
