"""Who cannot serve a request. Each filter says whether a worker stays."""

from collections.abc import Callable

from control_plane.routing.view import NoPlacement, RoutingRequest, WorkerView


def serves_model(worker: WorkerView, request: RoutingRequest) -> bool:
    return request.model_fingerprint is None or worker.model_fingerprint == request.model_fingerprint


def is_healthy(worker: WorkerView, request: RoutingRequest) -> bool:
    return worker.is_healthy


def takes_requests(worker: WorkerView, request: RoutingRequest) -> bool:
    return not worker.is_draining


def has_not_failed(worker: WorkerView, request: RoutingRequest) -> bool:
    return worker.incarnation not in request.excluded


Filter = Callable[[WorkerView, RoutingRequest], bool]

# In order, each with what to say when it leaves nobody.
FILTERS: tuple[tuple[Filter, NoPlacement], ...] = (
    (serves_model, NoPlacement.OTHER_MODEL),
    (is_healthy, NoPlacement.UNHEALTHY),
    (takes_requests, NoPlacement.DRAINING),
    (has_not_failed, NoPlacement.ALL_FAILED),
)


def not_overloaded(worker: WorkerView, *, max_waiting: int) -> bool:
    """Judged by its own report: what was sent since may be running already, and it can refuse by itself."""
    return worker.load.num_waiting < max_waiting
