"""What a storm has left behind that nobody needs, once it has settled."""

from collections.abc import Mapping
from dataclasses import dataclass

import httpx
import psutil

from bench.chaos_site import Site, until

SETTLE_TIMEOUT_S = 30.0
# Connections between workers are opened when they are needed and kept.
SPARE_FDS = 8


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the cluster takes while it is idle."""

    num_fds: Mapping[str, int]  # of every process, by name
    sockets: frozenset[str]  # in its directory
    num_processes: int


def footprint(site: Site) -> Footprint:
    num_fds = {"launcher": _num_fds(site.cluster.launcher.pid)}
    for process in site.state().processes:
        if process.process_id is not None:
            num_fds[process.name] = _num_fds(process.process_id.pid)
    return Footprint(
        num_fds=num_fds,
        sockets=frozenset(path.name for path in (site.cluster.run_dir / "sockets").iterdir()),
        num_processes=len(site.cluster.launcher.children(recursive=True)),
    )


async def settled(site: Site) -> list[str]:
    """What requests have left on gateways and workers, a line each, by the end of a time to settle."""
    left: list[str] = []

    def nothing_is_left() -> bool:
        left[:] = held(site)
        return not left

    try:
        await until(nothing_is_left, what="nothing is left", timeout_s=SETTLE_TIMEOUT_S)
    except RuntimeError:
        return left
    return []


def held(site: Site) -> list[str]:
    """Requests, pages and leases, as everybody says who has some."""
    lines = []
    if not site.are_well(site.workers):
        lines.append("not every gateway knows every worker")
    for worker in (worker for members in site.members() for worker in members.values()):
        load = worker.load
        counts = {
            "running requests": load.num_running,
            "waiting requests": load.num_waiting,
            "leases": load.num_leases,
            "pages": load.num_pages - load.num_free_pages,
        }
        lines += [f"{worker.worker_id}: {number} {what}" for what, number in counts.items() if number]
    for name, door in site.doors.items():
        listed = httpx.get(f"http://127.0.0.1:{door.port}/admin/requests", trust_env=False).json()
        lines += [f"{name}: request {request['request_id']}" for request in listed["requests"]]
    return lines


def grown(before: Footprint, after: Footprint) -> list[str]:
    lines = [
        f"{name}: {after.num_fds[name]} descriptors instead of {number}"
        for name, number in before.num_fds.items()
        if after.num_fds.get(name, 0) > number + SPARE_FDS
    ]
    lines += [f"socket {name}" for name in sorted(after.sockets - before.sockets)]
    if after.num_processes > before.num_processes:
        lines.append(f"{after.num_processes} processes instead of {before.num_processes}")
    return lines


def _num_fds(pid: int) -> int:
    """Without the segments of the disk tier, of which there are more the more it holds."""
    process = psutil.Process(pid)
    return process.num_fds() - sum("/segment-" in file.path for file in process.open_files())
