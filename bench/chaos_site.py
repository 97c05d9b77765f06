"""The cluster that a storm rages in, with its Redis: who runs, who is known, and whether all is well."""

import asyncio
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from bench.chaos_load import GatewayDoor
from bench.cluster import RunningCluster, running_cluster
from bench.cutting import may_cut
from bench.redis_server import RedisServer
from bench.shared_memory import segments_of
from control_plane.cli.members import watch_workers
from control_plane.runtimes.process_id import ProcessId
from control_plane.runtimes.state import GatewayState, RunState, Status, read_state
from protos import worker_pb2

POLL_S = 0.1
# The pauses before a process that dies young is started again grow to 15 s.
RECOVERY_TIMEOUT_S = 60.0
NUM_GATEWAYS = 2
SHAPES = {
    "disaggregated": {"prefill": {"replicas": 2}, "decode": {"replicas": 2}},
    "mixed": {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "mixed": {"replicas": 2}},
}
TIER_BYTES = 64 * 2**20
DISK_BYTES = 6 * TIER_BYTES


class Site:
    def __init__(
        self, cluster: RunningCluster, redis: RedisServer, *, disk: Path | None, may_cut: bool
    ) -> None:
        self.cluster = cluster
        self.redis = redis
        self.disk = disk  # a file system of their own, if one could be mounted
        self.may_cut = may_cut  # connections of its workers
        self.shared_memory: set[Path] = set()  # all that was seen in use
        state = self.state()
        self.doors = {gateway.name: GatewayDoor(_port(gateway)) for gateway in state.gateways}
        self.workers = [process.name for process in state.processes if process.pool]
        self.generating = [process.name for process in state.processes if process.pool in ("decode", "mixed")]

    def state(self) -> RunState:
        found = read_state(self.cluster.run_dir)
        if found is None:
            raise RuntimeError(f"the cluster in {self.cluster.run_dir} has gone")
        return found

    def process(self, name: str) -> ProcessId | None:
        """None while it starts."""
        found = next(process for process in self.state().processes if process.name == name)
        return found.process_id if found.status is Status.READY else None

    def note_shared_memory(self) -> None:
        """Of all that run now: who is killed cannot be asked any more what it used."""
        processes = (process.process_id for process in self.state().processes)
        pids = [process.pid for process in processes if process is not None]
        self.shared_memory |= segments_of([self.cluster.launcher.pid, *pids])

    @asynccontextmanager
    async def full_disk(self) -> AsyncIterator[None]:
        """There is no room left on it. Raises RuntimeError where there is none of their own."""
        if self.disk is None:
            raise RuntimeError("only a disk that nobody else uses is filled")
        filler = self.disk / "filler"
        try:
            await asyncio.to_thread(_fill, filler)
            yield
        finally:
            filler.unlink(missing_ok=True)

    def control_address(self, worker: str) -> str:
        return f"unix:{self.cluster.run_dir / 'sockets' / f'{worker}.control.sock'}"

    def members(self) -> list[dict[str, worker_pb2.WorkerDescription]]:
        """By name, of every gateway's directory; empty of one that does not answer."""
        found = (
            watch_workers([gateway.directory_address], timeout_s=1.0) for gateway in self.state().gateways
        )
        return [{member.worker_id: member for member in members or ()} for members in found]

    def are_well(self, workers: Collection[str]) -> bool:
        """They serve, and every gateway knows these very incarnations of them."""
        processes = {worker: self.process(worker) for worker in workers}
        return all(
            process is not None
            and process.is_alive()
            and (member := members.get(worker)) is not None
            and member.pid == process.pid
            and not member.is_draining
            for members in self.members()
            for worker, process in processes.items()
        )


@contextmanager
def running_site(shape: str) -> Iterator[Site]:
    """Two gateways over a Redis, and two workers of each pool."""
    with tempfile.TemporaryDirectory(prefix="penstock-") as directory:  # a short path: it holds a socket
        redis = RedisServer(Path(directory))
        redis.start()
        disk = Path(directory, "disk")
        disk.mkdir()
        is_mounted = _mount(disk)
        settings: dict[str, Any] = {
            "gateway": {"replicas": NUM_GATEWAYS},
            "directory": {"redis_url": redis.url},
            "pools": SHAPES[shape],
            "routing": {"prefill_threshold_tokens": 32},
            # Lossy KV would change answers, as it may.
            "kv": {
                "memory_tier_bytes": TIER_BYTES,
                "disk_tier_bytes": TIER_BYTES,
                "disk_path": str(disk / "kv"),
                "max_level": 0,
            },
        }
        try:
            with running_cluster(settings) as cluster:
                yield Site(cluster, redis, disk=disk if is_mounted else None, may_cut=_may_cut())
        finally:
            redis.kill()
            if is_mounted:
                subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _mount(directory: Path) -> bool:
    """A small file system of its own there, where the rights allow it."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(directory)]
    made = subprocess.run(command, capture_output=True, check=False, text=True)
    if made.returncode:
        print(f"no disk is filled: {made.stderr.strip()}", flush=True)
    return made.returncode == 0


def _fill(filler: Path) -> None:
    """Grows the file until there is no room left."""
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**20))


def _may_cut() -> bool:
    may = may_cut()
    if not may:
        print("no worker is cut off: sockets of other processes may not be borrowed here", flush=True)
    return may


def is_ready(door: GatewayDoor) -> bool:
    try:
        reply = httpx.get(f"http://127.0.0.1:{door.port}/ready", trust_env=False, timeout=1.0)
    except httpx.TransportError:
        return False
    return reply.status_code == 200


async def until(holds: Callable[[], bool], *, what: str, timeout_s: float = RECOVERY_TIMEOUT_S) -> None:
    """Raises RuntimeError if `what` has not come about by then."""
    try:
        async with asyncio.timeout(timeout_s):
            while not await asyncio.to_thread(holds):  # noqa: ASYNC110  what is asked tells nobody
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise RuntimeError(f"not within {timeout_s:g} s: {what}") from None


def _port(gateway: GatewayState) -> int:
    return int(gateway.http_url.rpartition(":")[2])
