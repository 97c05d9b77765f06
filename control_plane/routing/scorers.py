"""How good a worker is for a request: each scorer gives a number in [0, 1], 1 is best."""

from collections.abc import Callable

from control_plane.routing.view import RoutingRequest, WorkerView

# So many prompt tokens in a queue, or requests on a worker, halve its score. Fixed, not relative to the other
# candidates: one request more or less must not outweigh a long cached prefix.
HALF_SCORE_TOKENS = 4096
HALF_SCORE_REQUESTS = 16


def prefix_overlap(worker: WorkerView, request: RoutingRequest) -> float:
    """The share of the prompt that need not be computed."""
    num_cached = request.num_cached_tokens.get(worker.incarnation.worker_id, 0)
    return min(1.0, num_cached / max(1, request.num_prompt_tokens))


def queue(worker: WorkerView, request: RoutingRequest) -> float:
    """How little is to be done there before and beside this request."""
    load = worker.load
    num_tokens = load.num_waiting_tokens + worker.num_unreported_tokens
    # Reports lag behind; what this gateway itself has there is known exactly.
    num_requests = max(load.num_running + load.num_waiting, worker.num_assigned)
    return (
        HALF_SCORE_TOKENS
        / (HALF_SCORE_TOKENS + num_tokens)
        * HALF_SCORE_REQUESTS
        / (HALF_SCORE_REQUESTS + num_requests)
    )


def free_pages(worker: WorkerView, request: RoutingRequest) -> float:
    """The share of pages that are free once everything sent there has its own."""
    num_free = worker.load.num_free_pages - worker.num_unreported_pages
    return min(1.0, max(0, num_free) / max(1, worker.load.num_pages))


Scorer = Callable[[WorkerView, RoutingRequest], float]

SCORERS: dict[str, Scorer] = {
    "prefix_overlap": prefix_overlap,
    "queue": queue,
    "free_pages": free_pages,
}
