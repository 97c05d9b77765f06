"""What Prometheus sees of the worker pools, as the gateway sees them; read when it scrapes."""

from functools import partial

from prometheus_client import CollectorRegistry, Gauge

from control_plane.directory.member import Role
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


def _num_ready(sessions: SessionPool, role: Role) -> int:
    return sum(session.is_ready and session.member.role is role for session in sessions.sessions())
