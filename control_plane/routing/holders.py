"""From whom the worker that computes a prompt can fetch what it lacks of it."""

from control_plane.directory.member import Incarnation
from control_plane.routing.scorers import WORTH_IN_DEVICE, WORTH_IN_MEMORY, WORTH_ON_DISK, queue
from control_plane.routing.view import ClusterView, Holding, RoutingRequest, WorkerView

MAX_HOLDERS = 3


def choose_holders(
    computes: Incarnation, request: RoutingRequest, view: ClusterView, *, model_fingerprint: bytes
) -> tuple[Holding, ...]:
    """Workers and stores of its model with more leading blocks than it has itself, best first.

    More blocks are better; of equals, faster tiers; then who has less to do.
    """
    num_own = request.overlap(computes.worker_id).num_blocks
    holders = [
        worker
        for worker in view.workers
        if worker.is_healthy
        and worker.incarnation != computes
        and worker.incarnation not in request.excluded
        and worker.model_fingerprint in (b"", model_fingerprint)
        and request.overlap(worker.incarnation.worker_id).num_blocks > num_own
    ]
    holders.sort(key=lambda worker: _order(worker, request))
    return tuple(
        Holding(
            holder=worker.incarnation,
            num_blocks=request.overlap(worker.incarnation.worker_id).num_blocks,
        )
        for worker in holders[:MAX_HOLDERS]
    )


def _order(worker: WorkerView, request: RoutingRequest) -> tuple[float, float, float, Incarnation]:
    overlap = request.overlap(worker.incarnation.worker_id)
    speed = (
        WORTH_IN_DEVICE * overlap.num_device_blocks
        + WORTH_IN_MEMORY * overlap.num_memory_blocks
        + WORTH_ON_DISK * overlap.num_disk_blocks
    )
    return -overlap.num_blocks, -speed, -queue(worker, request), worker.incarnation
