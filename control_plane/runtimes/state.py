"""`run_dir/state.json`: what runs here, for `penstock status`, `down` and `chat`. The launcher writes it.

The launcher holds a lock on the run directory for as long as it lives, so a state file without a lock is
stale: its launcher was killed. The lock is on the directory itself; a lock file could not be removed without a
race.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from control_plane.config import SOCKET_DIR
from control_plane.runtimes.errors import AlreadyRunning, RuntimeFailure
from control_plane.runtimes.process_id import ProcessId, identify
from control_plane.runtimes.service import DRAINED_DIR

STATE_FILE = "state.json"
EFFECTIVE_CONFIG_FILE = "effective.yaml"  # not a name that somebody gives a file of their own
STATE_VERSION = 2


class Status(Enum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # it died; the next start comes after a pause
    STOPPING = "stopping"
    DRAINED = "drained"  # out of service until penstock resume
    STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessState:
    name: str
    pool: str  # "prefill", "decode", "mixed", "store"; "" for a control process
    status: Status
    detail: str = ""  # the last thing it said while it starts, or why it died
    progress: float | None = None  # of loading, 0 to 1
    process_id: ProcessId | None = None
    cores: tuple[int, ...] = ()  # empty: any
    num_restarts: int = 0
    log_path: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayState:
    """Where one control process serves."""

    name: str
    http_url: str
    grpc_address: str
    directory_address: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    launcher: ProcessId
    ready: bool
    gateways: tuple[GatewayState, ...]  # one at least; any of them answers any request
    model: str
    processes: tuple[ProcessState, ...]

    @property
    def http_url(self) -> str:
        return self.gateways[0].http_url

    @property
    def grpc_address(self) -> str:
        return self.gateways[0].grpc_address

    def write(self, run_dir: Path) -> None:
        """Replaces the file in one step: readers see the old state or the new one."""
        raw = {"version": STATE_VERSION, **asdict(self)}
        temporary = run_dir / f"{STATE_FILE}.tmp"
        temporary.write_text(json.dumps(raw, default=lambda value: value.value, indent=1))
        temporary.replace(run_dir / STATE_FILE)


def read_state(run_dir: Path) -> RunState | None:
    """None if nothing was started here, or all of it was stopped in order."""
    path = run_dir / STATE_FILE
    try:
        raw = json.loads(path.read_text())
        version = raw.pop("version")
        if version != STATE_VERSION:
            raise RuntimeFailure(f"{path} has version {version}, this program reads {STATE_VERSION}")
        read = {
            "launcher": ProcessId(**raw["launcher"]),
            "gateways": tuple(GatewayState(**entry) for entry in raw["gateways"]),
            "processes": tuple(_process_state(entry) for entry in raw["processes"]),
        }
        return RunState(**{**raw, **read})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise RuntimeFailure(f"{path} is damaged ({e}): remove it once nothing of that cluster runs") from e


def _process_state(raw: dict[str, object]) -> ProcessState:
    process_id = raw["process_id"]
    changes = {
        "status": Status(raw["status"]),
        "process_id": ProcessId(**process_id) if isinstance(process_id, dict) else None,
        "cores": tuple(raw["cores"]) if isinstance(raw["cores"], list) else (),
    }
    return ProcessState(**{**raw, **changes})  # type: ignore[arg-type]


def remove_leftovers(run_dir: Path) -> None:
    """Removes the state file, the effective configuration and the sockets. Logs and disk tiers stay."""
    for path in [run_dir / STATE_FILE, run_dir / f"{STATE_FILE}.tmp", run_dir / EFFECTIVE_CONFIG_FILE]:
        path.unlink(missing_ok=True)
    shutil.rmtree(run_dir / DRAINED_DIR, ignore_errors=True)
    socket_dir = run_dir / SOCKET_DIR
    if socket_dir.is_dir():
        for path in socket_dir.iterdir():
            if path.is_socket():
                path.unlink()
        with suppress(OSError):  # something in it is not ours
            socket_dir.rmdir()


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Holds the run directory for this process. Raises AlreadyRunning if another launcher has it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            state = read_state(run_dir)
            owner = f" (process {state.launcher.pid}, {state.http_url})" if state else ""
            raise AlreadyRunning(
                f"a cluster is running in {run_dir}{owner}: stop it with penstock down or choose another run_dir"
            ) from e
        yield
    finally:
        os.close(handle)


def own_process_id() -> ProcessId:
    process_id = identify(os.getpid())
    assert process_id is not None, "this process is not in /proc"
    return process_id
