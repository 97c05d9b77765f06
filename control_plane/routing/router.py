"""The one decision: filter, score, pick."""

from collections.abc import Iterable

from control_plane.directory.member import Incarnation, Role
from control_plane.routing.filters import FILTERS, not_overloaded
from control_plane.routing.holders import choose_holders
from control_plane.routing.policy import RoutingPolicy
from control_plane.routing.scorers import SCORERS
from control_plane.routing.view import ClusterView, NoPlacement, Placement, RoutingRequest, WorkerView


def route(request: RoutingRequest, view: ClusterView, policy: RoutingPolicy) -> Placement | NoPlacement:
    """Who serves `request`. The same arguments always give the same answer.

    The decode worker comes first. It computes the prompt itself when what it has not cached is shorter than
    the threshold, or when nobody is there to do it. Cached is what is in any tier of its own: those blocks would
    have to be loaded or pulled by it in any case. What others hold does not count: a prefill worker can fetch
    that as well, and compute the rest without disturbing what the decode worker generates.
    """
    decoders = _usable((worker for worker in view.workers if worker.role.can_decode), request, policy)
    if isinstance(decoders, NoPlacement):
        return decoders
    decode = _pick(decoders, request, policy)
    prefill = _prefill_for(decode, request, view, policy)
    computes = prefill or decode.incarnation
    return Placement(
        decode=decode.incarnation,
        prefill=prefill,
        kv_holders=choose_holders(computes, request, view, model_fingerprint=decode.model_fingerprint),
        num_uncached_tokens=request.num_prompt_tokens - request.num_cached_tokens(computes.worker_id),
    )


def _prefill_for(
    decode: WorkerView, request: RoutingRequest, view: ClusterView, policy: RoutingPolicy
) -> Incarnation | None:
    num_uncached = request.num_prompt_tokens - request.num_cached_tokens(decode.incarnation.worker_id)
    if not request.can_hand_over or num_uncached < policy.prefill_threshold_tokens:
        return None
    candidates = [
        worker
        for worker in view.workers
        if worker.role.can_prefill
        and worker.incarnation != decode.incarnation
        and worker.model_fingerprint == decode.model_fingerprint
    ]
    usable = _usable(candidates, request, policy)
    if isinstance(usable, NoPlacement):
        return None
    specialists = [worker for worker in usable if worker.role is Role.PREFILL]
    if not specialists and decode.role is Role.MIXED:
        return None  # two of a kind: the other would compute the prompt no better than this one
    return _pick(specialists or usable, request, policy).incarnation


def _usable(
    workers: Iterable[WorkerView], request: RoutingRequest, policy: RoutingPolicy
) -> list[WorkerView] | NoPlacement:
    """Those that pass every filter; never empty."""
    remaining = list(workers)
    reason = NoPlacement.NO_DECODE_WORKER
    for passes, reason_if_none in FILTERS:
        if not remaining:
            return reason
        remaining = [worker for worker in remaining if passes(worker, request)]
        reason = reason_if_none
    if not remaining:
        return reason
    remaining = [worker for worker in remaining if not_overloaded(worker, max_waiting=policy.max_waiting)]
    return remaining or NoPlacement.OVERLOADED


def _pick(workers: list[WorkerView], request: RoutingRequest, policy: RoutingPolicy) -> WorkerView:
    """The best score; among equals the one not picked for the longest time, then the smallest id."""
    return min(
        workers,
        key=lambda worker: (-_score(worker, request, policy), worker.last_pick, worker.incarnation),
    )


def _score(worker: WorkerView, request: RoutingRequest, policy: RoutingPolicy) -> float:
    """The weighted mean of all scores, in [0, 1]."""
    total = sum(weight * SCORERS[name](worker, request) for name, weight in policy.weights.items() if weight)
    return total / sum(policy.weights.values())
