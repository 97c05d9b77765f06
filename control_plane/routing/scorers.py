"""How good a worker is for a request: each scorer gives a number in [0, 1], 1 is best."""

from collections.abc import Callable

from control_plane.directory.member import WorkerId
from control_plane.routing.view import RoutingRequest, WorkerView
from kvstore.blocks import BLOCK_SIZE_TOKENS

# So many prompt tokens in a queue, or requests on a worker, halve its score. Fixed, not relative to the other
# candidates: one request more or less must not outweigh a long cached prefix.
HALF_SCORE_TOKENS = 4096
HALF_SCORE_REQUESTS = 16
# What a cached token is worth, in computed ones, by how far it is. Loading takes time and a place in a queue.
WORTH_IN_DEVICE = 1.0
WORTH_IN_MEMORY = 0.95
WORTH_ON_DISK = 0.8
WORTH_AT_A_PEER = 0.5
# Shorter prompts count as if they had so many tokens: to save a few is worth little, whatever their share.
MIN_PROMPT_TOKENS = 512


def prefix_overlap(worker: WorkerView, request: RoutingRequest) -> float:
    """The share of the prompt that need not be computed, worth the less the longer the queue there is.

    The product bounds what a popular prefix may do to the one who holds it, whatever the weights: with a score of
    1 for its holder and WORTH_AT_A_PEER for everybody else, who can fetch it, the holder is not chosen any more
    once its queue score is less than that part of theirs.
    """
    num_saved = tokens_saved(worker.incarnation.worker_id, request)
    share = num_saved / max(MIN_PROMPT_TOKENS, request.num_prompt_tokens)
    return min(1.0, share) * queue(worker, request)


def tokens_saved(worker_id: WorkerId, request: RoutingRequest) -> float:
    """Prompt tokens that this worker does not compute, less what it costs to get them from where they are."""
    own = request.overlap(worker_id)
    num_blocks = (
        WORTH_IN_DEVICE * own.num_device_blocks
        + WORTH_IN_MEMORY * own.num_memory_blocks
        + WORTH_ON_DISK * own.num_disk_blocks
        + WORTH_AT_A_PEER * max(0, request.max_overlap_blocks - own.num_blocks)
    )
    return min(float(request.num_prompt_tokens), num_blocks * BLOCK_SIZE_TOKENS)


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
