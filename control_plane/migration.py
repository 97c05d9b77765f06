"""Which requests should move to which workers: one measure for balance, room, urgency and drain (Llumnix).

A worker's *freeness* is how many pages each of its running requests can still grow by: its pages, less those that are
used *virtually*, over the number that runs. Virtual usage is what requests hold, what the waiting ones need to start,
and what must stay free for urgent ones; a worker that drains has none left at all. Requests move from workers of
little freeness to those of much, one at a time from each. Four things keep them from going to and fro: the two
thresholds lie apart; the target must be left freer than the source was; who has moved rests; and a worker whose report
cannot show its last move yet is not balanced again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from control_plane.directory.member import Incarnation
from control_plane.routing.view import WorkerView
from kvstore.blocks import BLOCK_SIZE_TOKENS


class MoveReason(Enum):
    OPERATOR = "operator"
    DRAIN = "drain"  # the worker is going away
    BALANCE = "balance"  # those that run there soon have no page to grow into
    DEFRAGMENT = "defragment"  # so that a waiting request finds enough pages in one place
    PRIORITY = "priority"  # room for urgent ones


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestView:
    """A request of this gateway on a worker. `rested_s`: since the last try to move it; infinite if there was none."""

    request_id: str
    worker: Incarnation
    num_tokens: int  # prompt and output so far
    priority: int = 0  # lower is sooner; below 0 is urgent
    is_moving: bool = False
    rested_s: float = float("inf")
    excluded: frozenset[Incarnation] = frozenset()  # workers that have failed it


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrationView:
    """`unsettled`: workers that a request has left so lately that their reports may not show it."""

    workers: tuple[WorkerView, ...]
    requests: tuple[RequestView, ...]
    unsettled: frozenset[Incarnation] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrationLimits:
    """Requests leave workers of less freeness than `low_freeness` for those of more than `high_freeness`."""

    low_freeness: float
    high_freeness: float
    rest_s: float  # between two moves of one request, unless its worker drains
    urgent_headroom: float = 0.1  # of all pages, kept free where an urgent request runs


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedMove:
    request_id: str
    source: Incarnation
    target: Incarnation
    reason: MoveReason


@dataclass(slots=True)
class _Worker:
    """While a plan is made: what its moves will have brought to a target is on its books already."""

    view: WorkerView
    requests: list[RequestView]
    num_used_pages: int
    num_running: int
    num_seats_taken: int  # of those who wait for one too
    urgent_headroom: float
    has_urgent: bool

    def freeness(self, *, with_demand: bool = True, with_headroom: bool = True) -> float:
        num_pages = self.view.load.num_pages
        num_virtual = float(self.num_used_pages)
        if with_demand:
            num_virtual += self.view.load.num_demanded_pages
        if with_headroom and self.has_urgent:
            num_virtual += self.urgent_headroom * num_pages
        return (num_pages - num_virtual) / max(1, self.num_running)

    def has_room(self, request: RequestView) -> bool:
        """A seat, and pages for what it holds and to grow into, beside what waits there."""
        load, max_num_seqs = self.view.load, self.view.max_num_seqs
        if max_num_seqs is not None and self.num_seats_taken >= max_num_seqs:
            return False
        num_left = load.num_pages - self.num_used_pages - load.num_demanded_pages
        return num_left > num_pages_of(request.num_tokens)

    def with_request(self, request: RequestView) -> "_Worker":
        return replace(
            self,
            num_used_pages=self.num_used_pages + num_pages_of(request.num_tokens),
            num_running=self.num_running + 1,
            num_seats_taken=self.num_seats_taken + 1,
            has_urgent=self.has_urgent or request.priority < 0,
        )


def num_pages_of(num_tokens: int) -> int:
    return num_tokens // BLOCK_SIZE_TOKENS + 1


def plan_moves(view: MigrationView, limits: MigrationLimits) -> tuple[PlannedMove, ...]:
    """At most one from each worker, those that need it most first. The same arguments give the same answer."""
    workers = _workers(view, limits)
    sources = [
        (reason, worker)
        for worker in workers
        if (reason := _reason(worker, view, limits)) is not None
        and not any(request.is_moving for request in worker.requests)
    ]
    sources.sort(key=lambda source: (*_need(*source), source[1].view.incarnation))
    moves = []
    for reason, source in sources:
        move = _plan_one(reason, source, workers, limits)
        if move is not None:
            moves.append(move)
    return tuple(moves)


def _workers(view: MigrationView, limits: MigrationLimits) -> list[_Worker]:
    by_worker: dict[Incarnation, list[RequestView]] = {}
    for request in view.requests:
        by_worker.setdefault(request.worker, []).append(request)
    return [
        _worker(worker, by_worker.get(worker.incarnation, []), limits)
        for worker in view.workers
        if worker.role.can_decode
    ]


def _worker(view: WorkerView, requests: list[RequestView], limits: MigrationLimits) -> _Worker:
    load = view.load
    return _Worker(
        view=view,
        requests=requests,
        num_used_pages=load.num_pages - load.num_free_pages + view.num_unreported_pages,
        num_running=load.num_running,
        # What was sent there since its last report is among what it was assigned.
        num_seats_taken=max(load.num_running + load.num_waiting, view.num_assigned),
        urgent_headroom=limits.urgent_headroom,
        has_urgent=any(request.priority < 0 for request in requests),
    )


def _reason(worker: _Worker, view: MigrationView, limits: MigrationLimits) -> MoveReason | None:
    """Why requests should leave; the reason without which they need not."""
    if not worker.view.is_healthy:
        return None  # nobody can pull from it
    if worker.view.is_draining:
        return MoveReason.DRAIN
    if worker.view.incarnation in view.unsettled or worker.freeness() >= limits.low_freeness:
        return None
    if worker.freeness(with_demand=False, with_headroom=False) < limits.low_freeness:
        return MoveReason.BALANCE
    if worker.freeness(with_headroom=False) < limits.low_freeness:
        return MoveReason.DEFRAGMENT
    return MoveReason.PRIORITY


def _need(reason: MoveReason, source: _Worker) -> tuple[bool, float]:
    return reason is not MoveReason.DRAIN, source.freeness()


def _plan_one(
    reason: MoveReason, source: _Worker, workers: list[_Worker], limits: MigrationLimits
) -> PlannedMove | None:
    """Its target has the request on its books afterwards."""
    for request in _leavers(reason, source, limits):
        fitting = [
            worker
            for worker in workers
            if _can_take(worker, request, source)
            and (reason is MoveReason.DRAIN or _is_better(worker, request, source, limits))
        ]
        if fitting:
            target = min(fitting, key=lambda worker: (-worker.freeness(), worker.view.incarnation))
            workers[workers.index(target)] = target.with_request(request)
            return PlannedMove(
                request_id=request.request_id,
                source=source.view.incarnation,
                target=target.view.incarnation,
                reason=reason,
            )
    return None


def _leavers(reason: MoveReason, source: _Worker, limits: MigrationLimits) -> Iterator[RequestView]:
    """The least urgent first, of those the shortest, whose pages take least to copy; the tired ones last or never.

    Urgent requests do not make room for themselves.
    """

    def order(request: RequestView) -> tuple[bool, int, int, str]:
        return request.rested_s < limits.rest_s, -request.priority, request.num_tokens, request.request_id

    for request in sorted(source.requests, key=order):
        has_rested = request.rested_s >= limits.rest_s
        makes_room = reason is not MoveReason.PRIORITY or request.priority >= 0
        if reason is MoveReason.DRAIN or (has_rested and makes_room):
            yield request


def _can_take(worker: _Worker, request: RequestView, source: _Worker) -> bool:
    view = worker.view
    return (
        view.incarnation != source.view.incarnation
        and view.model_fingerprint == source.view.model_fingerprint
        and view.is_healthy
        and not view.is_draining
        and view.incarnation not in request.excluded
        and worker.has_room(request)
    )


def _is_better(worker: _Worker, request: RequestView, source: _Worker, limits: MigrationLimits) -> bool:
    """Much freer than the source is, even with the request."""
    freeness_after = worker.with_request(request).freeness()
    return worker.freeness() > limits.high_freeness and freeness_after > max(
        source.freeness(), limits.low_freeness
    )
