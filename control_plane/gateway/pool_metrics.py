"""What Prometheus sees of the worker pools, as the gateway sees them; read when it scrapes."""

from collections.abc import Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Gauge, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from control_plane.directory.member import Role
from control_plane.directory.memory import MemoryDirectory
from control_plane.directory.redis_link import RedisLink
from control_plane.gateway.dispatch import PoolDispatcher
from control_plane.gateway.sessions import SessionPool


def add_pool_metrics(
    registry: CollectorRegistry, *, dispatcher: PoolDispatcher, sessions: SessionPool
) -> None:
    admission = dispatcher.admission
    running = Gauge(
        "penstock_gateway_generations_running", "Generations the pools work on", registry=registry
    )
    running.set_function(lambda: admission.num_running)
    waiting = Gauge(
        "penstock_gateway_generations_waiting", "Generations waiting for a place", registry=registry
    )
    waiting.set_function(lambda: admission.num_waiting)
    workers = Gauge(
        "penstock_gateway_workers", "Workers with a session, by role", ("role",), registry=registry
    )
    for role in Role:
        workers.labels(role.value).set_function(partial(_num_ready, sessions, role))


class DirectoryMetrics(Collector):
    """Of what this gateway knows about workers and their blocks."""

    def __init__(self, directory: MemoryDirectory, link: RedisLink | None) -> None:
        self._directory = directory
        self._link = link

    def collect(self) -> Iterator[Metric]:
        blocks = self._directory.blocks
        yield GaugeMetricFamily(
            "penstock_directory_blocks", "Different KV blocks that routing knows of", value=blocks.num_blocks
        )
        yield CounterMetricFamily(
            "penstock_block_format_mismatches",
            "Reports of workers that name blocks in another format, which matches nothing",
            value=self._directory.num_format_mismatches,
        )
        if self._link is not None:
            yield GaugeMetricFamily(
                "penstock_directory_redis_up",
                "Whether this gateway shares its directory now: 1, or 0 while Redis is away",
                value=self._link.is_up,
            )


def _num_ready(sessions: SessionPool, role: Role) -> int:
    return sum(session.is_ready and session.member.role is role for session in sessions.sessions())
