"""A real cluster for the time of a measurement: `penstock up` in its own directory, on free ports."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class RunningCluster:
    launcher: psutil.Process
    port: int
    run_dir: Path
    grpc_port: int
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    def worker_processes(self) -> list[psutil.Process]:
        return [child for child in self.launcher.children(recursive=True) if "workers" in child.cmdline()]

    def process(self, word: str) -> psutil.Process:
        """The one process of the cluster whose command line holds `word` as an argument."""
        found = [child for child in self.launcher.children(recursive=True) if word in child.cmdline()]
        if len(found) != 1:
            raise RuntimeError(f"expected one process with {word!r} in its command line, found {found}")
        return found[0]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.host}:{self.port}{path}", timeout=10) as reply:
            return json.load(reply)


@contextlib.contextmanager
def running_cluster(settings: Mapping[str, Any]) -> Iterator[RunningCluster]:
    """`settings` are those of the cluster file; ports and run_dir are filled in. Stops by Ctrl-C at the end."""
    with tempfile.TemporaryDirectory(prefix="penstock-") as directory:
        replicas = settings.get("gateway", {}).get("replicas", 1)
        port = free_ports(2 * replicas)
        grpc_port = port + replicas
        gateway = {**settings.get("gateway", {}), "port": port, "grpc_port": grpc_port}
        config = Path(directory, "cluster.yaml")
        config.write_text(yaml.safe_dump({**settings, "gateway": gateway, "run_dir": directory}))
        log_path = Path(directory, "up.log")
        with log_path.open("wb") as log:
            launcher = subprocess.Popen(
                [sys.executable, "-m", "control_plane.cli", "up", "--config", str(config)],
                stdout=log,
                stderr=log,
            )
        try:
            _wait_until_ready(launcher, log_path)
            yield RunningCluster(psutil.Process(launcher.pid), port, Path(directory), grpc_port)
        finally:
            launcher.send_signal(signal.SIGINT)
            try:
                launcher.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
                raise


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_ports(number: int) -> int:
    """The first of so many in a row."""
    while True:
        first = free_port()
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError, OverflowError):
            for port in range(first, first + number):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def _wait_until_ready(launcher: "subprocess.Popen[bytes]", log_path: Path) -> None:
    """Until the launcher says that it serves: /ready alone does not wait for every worker."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and launcher.poll() is None:
        if "\nServing " in log_path.read_text():
            return
        time.sleep(0.05)
    raise RuntimeError(f"the cluster did not become ready:\n{log_path.read_text()[-3000:]}")
