import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from control_plane.config import ClusterConfig, load_config
from control_plane.runtimes.commands import Commands, WorkerPlace

FAKE_PROCESS = str(Path(__file__).with_name("fake_process.py"))
MakeCommands = Callable[[dict[str, str]], Commands]


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """Short, for Unix sockets: pytest's own temporary directories are not."""
    path = Path(tempfile.mkdtemp(prefix="penstock-test-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def config(run_dir: Path) -> ClusterConfig:
    """One prefill and two decode workers on free ports, without disk tiers."""
    overrides = ["gateway.port=0", "gateway.grpc_port=0", "pools.decode.replicas=2", "kv.disk_tier_bytes=0"]
    config = load_config(overrides=overrides)
    gateway = replace(config.gateway, drain_timeout_s=0.0)
    return replace(config, run_dir=run_dir, gateway=gateway, start_timeout_s=20.0, stop_timeout_s=10.0)


@pytest.fixture
def make_commands() -> MakeCommands:
    """Commands of fake processes; the argument says how a worker, by its name, is to behave."""

    def make(behaviours: dict[str, str]) -> Commands:
        def control(path: Path, replica: int) -> list[str]:
            return [sys.executable, FAKE_PROCESS, "control", str(path), str(replica)]

        def worker(config: ClusterConfig, place: WorkerPlace) -> list[str]:
            path = config.socket_dir / f"{place.name}.control.sock"
            return [sys.executable, FAKE_PROCESS, "worker", str(path), behaviours.get(place.name, "")]

        return Commands(control=control, worker=worker)

    return make
