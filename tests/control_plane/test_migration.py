"""The planner alone: what it proposes, and what becomes of a cluster that does what it says, round after round."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.directory.member import Incarnation, Role, WorkerId, WorkerLoad
from control_plane.migration import (
    MigrationLimits,
    MigrationView,
    MoveReason,
    PlannedMove,
    RequestView,
    num_pages_of,
    plan_moves,
)
from control_plane.routing.view import WorkerView

LIMITS = MigrationLimits(low_freeness=4, high_freeness=16, rest_s=10)
NUM_PAGES = 100


def name(worker_id: str) -> Incarnation:
    return Incarnation(WorkerId(worker_id), 1)


def worker(
    worker_id: str, *, num_running: int = 0, num_free: int = NUM_PAGES, **fields: object
) -> WorkerView:
    load = WorkerLoad(num_running=num_running, num_pages=NUM_PAGES, num_free_pages=num_free)
    defaults: dict[str, object] = {
        "incarnation": name(worker_id),
        "role": Role.DECODE,
        "model_fingerprint": b"model",
        "load": load,
    }
    return WorkerView(**{**defaults, **fields})


def request(request_id: str, worker_id: str = "full", num_tokens: int = 160, **fields: object) -> RequestView:
    return RequestView(request_id=request_id, worker=name(worker_id), num_tokens=num_tokens, **fields)


def plan(workers: list[WorkerView], requests: list[RequestView], **fields: object) -> list[PlannedMove]:
    view = MigrationView(workers=tuple(workers), requests=tuple(requests), **fields)
    return list(plan_moves(view, LIMITS))


def brief(moves: list[PlannedMove]) -> list[tuple[str, str, str]]:
    return [(move.request_id, move.target.worker_id, move.reason.value) for move in moves]


FULL = worker("full", num_running=9, num_free=1)
IDLE = worker("idle")


def test_requests_leave_a_worker_where_they_soon_cannot_grow() -> None:
    assert brief(plan([FULL, IDLE], [request("r")])) == [("r", "idle", "balance")]


def test_nothing_moves_while_everybody_can_grow() -> None:
    roomy = worker("full", num_running=9, num_free=50)
    assert plan([roomy, IDLE], [request("r")]) == []


def test_the_freest_worker_is_chosen() -> None:
    half = worker("half", num_running=1, num_free=50)
    assert brief(plan([FULL, half, IDLE], [request("r")])) == [("r", "idle", "balance")]


@pytest.mark.parametrize(
    "target",
    [
        worker("t", is_draining=True),
        worker("t", is_healthy=False),
        worker("t", model_fingerprint=b"other"),
        worker("t", role=Role.PREFILL),
        worker("t", role=Role.STORE),
        worker("t", num_running=1, num_free=10),  # no room for its 11 pages and one more
        worker("t", num_running=9, num_free=90, num_unreported_pages=80),  # others are on their way there
    ],
)
@pytest.mark.parametrize("is_draining", [False, True])
def test_nothing_moves_to_a_worker_that_cannot_take_it(target: WorkerView, is_draining: bool) -> None:
    assert plan([replace(FULL, is_draining=is_draining), target], [request("r")]) == []


@pytest.mark.parametrize("is_draining", [False, True])
@pytest.mark.parametrize(
    ("num_running", "num_assigned", "has_seat"), [(1, 0, True), (2, 0, False), (0, 1, True), (0, 2, False)]
)
def test_nothing_moves_where_no_seat_is_left(
    num_running: int, num_assigned: int, has_seat: bool, is_draining: bool
) -> None:
    target = worker("t", num_running=num_running, num_assigned=num_assigned, max_num_seqs=2)
    moves = plan([replace(FULL, is_draining=is_draining), target], [request("r")])
    assert len(moves) == has_seat


def test_a_seat_is_given_once() -> None:
    sources = [worker("one", is_draining=True), worker("two", is_draining=True)]
    target = worker("t", num_running=1, max_num_seqs=2)
    assert len(plan([*sources, target], [request("r", "one"), request("s", "two")])) == 1


def test_nothing_moves_to_a_worker_that_failed_the_request() -> None:
    assert plan([FULL, IDLE], [request("r", excluded=frozenset({name("idle")}))]) == []


def test_nothing_moves_where_it_would_be_no_better_off() -> None:
    alone = worker("full", num_running=1, num_free=1)
    assert plan([alone, IDLE], [request("r", num_tokens=99 * 16 - 1)]) == []


def test_the_least_urgent_goes_first_then_the_shortest() -> None:
    requests = [
        request("urgent", priority=-1, num_tokens=16),
        request("normal", num_tokens=16),
        request("long", priority=2, num_tokens=320),
        request("short", priority=2, num_tokens=160),
    ]
    order = []
    while requests:
        ((request_id, _, _),) = brief(plan([FULL, IDLE], requests))
        order.append(request_id)
        requests = [each for each in requests if each.request_id != request_id]
    assert order == ["short", "long", "normal", "urgent"]


def test_a_large_waiting_request_makes_others_leave() -> None:
    load = WorkerLoad(
        num_running=2, num_waiting=1, num_pages=NUM_PAGES, num_free_pages=40, num_demanded_pages=60
    )
    fragmented = worker("full", load=load)
    assert brief(plan([fragmented, IDLE], [request("r")])) == [("r", "idle", "defragment")]


def test_where_a_large_request_waits_nothing_else_is_sent() -> None:
    load = WorkerLoad(num_waiting=1, num_pages=NUM_PAGES, num_free_pages=NUM_PAGES, num_demanded_pages=95)
    assert plan([FULL, worker("t", load=load)], [request("r")]) == []


def test_others_make_room_for_an_urgent_request_which_stays() -> None:
    crowded = worker("full", num_running=4, num_free=20)
    requests = [request("other"), request("urgent", priority=-5, num_tokens=16)]
    assert brief(plan([crowded, IDLE], requests)) == [("other", "idle", "priority")]
    assert plan([crowded, IDLE], requests[1:]) == []
    assert plan([crowded, IDLE], requests[:1]) == []


def test_a_draining_worker_is_left_even_for_a_crowded_one() -> None:
    draining = worker("full", num_running=1, num_free=80, is_draining=True)
    crowded = worker("crowded", num_running=9, num_free=20)
    moves = plan([draining, crowded], [request("r", rested_s=0.5)])
    assert brief(moves) == [("r", "crowded", "drain")]


def test_what_failed_to_leave_a_draining_worker_does_not_hold_up_the_rest() -> None:
    draining = replace(FULL, is_draining=True)
    requests = [request("failed", priority=9, rested_s=0.1), request("fresh")]
    assert brief(plan([draining, IDLE], requests)) == [("fresh", "idle", "drain")]


def test_one_at_a_time_leaves_a_worker() -> None:
    requests = [request("moving", is_moving=True), request("r")]
    assert plan([FULL, IDLE], requests) == []
    assert plan([replace(FULL, is_draining=True), IDLE], requests) == []


def test_who_has_moved_rests() -> None:
    assert plan([FULL, IDLE], [request("r", rested_s=9.9)]) == []
    assert len(plan([FULL, IDLE], [request("r", rested_s=10)])) == 1


def test_a_worker_that_somebody_just_left_is_not_judged_by_an_old_report() -> None:
    unsettled = frozenset({name("full")})
    assert plan([FULL, IDLE], [request("r")], unsettled=unsettled) == []
    draining = replace(FULL, is_draining=True)
    assert len(plan([draining, IDLE], [request("r")], unsettled=unsettled)) == 1


def test_two_that_leave_at_once_do_not_crowd_one_target() -> None:
    other = replace(FULL, incarnation=name("also-full"))
    small = worker("small", num_running=1, num_free=20)
    requests = [request("r"), request("s", "also-full")]
    assert len(plan([FULL, other, small], requests)) == 1
    assert len(plan([FULL, other, small, IDLE], requests)) == 2


def test_a_worker_that_nobody_reaches_is_left_alone() -> None:
    assert plan([replace(FULL, is_healthy=False), IDLE], [request("r")]) == []


# Rounds.


@dataclass
class World:
    """Workers of NUM_PAGES pages whose reports are true, and requests that neither grow nor end."""

    tokens: dict[str, int]
    priorities: dict[str, int]
    places: dict[str, str]
    workers: list[str]
    draining: frozenset[str]
    now_s: float = 0.0
    moved_s: dict[str, float] = field(default_factory=dict)

    def view(self) -> MigrationView:
        return MigrationView(
            workers=tuple(self._worker(worker_id) for worker_id in self.workers),
            requests=tuple(
                RequestView(
                    request_id=request_id,
                    worker=name(place),
                    num_tokens=self.tokens[request_id],
                    priority=self.priorities[request_id],
                    rested_s=self.now_s - self.moved_s.get(request_id, float("-inf")),
                )
                for request_id, place in self.places.items()
            ),
        )

    def num_used(self, worker_id: str) -> int:
        return sum(
            num_pages_of(self.tokens[each]) for each, place in self.places.items() if place == worker_id
        )

    def _worker(self, worker_id: str) -> WorkerView:
        num_running = sum(place == worker_id for place in self.places.values())
        num_free = NUM_PAGES - self.num_used(worker_id)
        return worker(
            worker_id, num_running=num_running, num_free=num_free, is_draining=worker_id in self.draining
        )

    def round(self) -> list[PlannedMove]:
        moves = list(plan_moves(self.view(), LIMITS))
        for move in moves:
            assert self.places[move.request_id] == move.source.worker_id
            self.places[move.request_id] = move.target.worker_id
            self.moved_s[move.request_id] = self.now_s
        self.now_s += 1.0
        return moves


@st.composite
def worlds(draw: st.DrawFn, *, num_draining: int = 0) -> World:
    workers = [f"w{number}" for number in range(draw(st.integers(2, 5)))]
    world = World({}, {}, {}, workers, frozenset(workers[:num_draining]))
    for number in range(draw(st.integers(0, 30))):
        request_id, place = f"r{number:02}", draw(st.sampled_from(workers))
        num_tokens = draw(st.integers(1, 600))
        if world.num_used(place) + num_pages_of(num_tokens) <= NUM_PAGES:
            world.tokens[request_id], world.places[request_id] = num_tokens, place
            world.priorities[request_id] = draw(st.integers(-1, 2))
    return world


@settings(max_examples=150, deadline=None)
@given(worlds())
def test_under_constant_load_it_comes_to_rest_and_overfills_nobody(world: World) -> None:
    num_moves = dict.fromkeys(world.tokens, 0)
    last_s = 0.0
    for _ in range(400):
        for move in world.round():
            num_moves[move.request_id] += 1
            last_s = world.now_s
        assert all(world.num_used(worker_id) <= NUM_PAGES for worker_id in world.workers)
    assert last_s <= 300, "requests still move after 300 rounds"
    assert max(num_moves.values(), default=0) <= len(world.workers)


@settings(max_examples=150, deadline=None)
@given(worlds(num_draining=1))
def test_a_draining_worker_is_emptied_where_room_exists(world: World) -> None:
    for _ in range(40):
        for move in world.round():
            assert move.target.worker_id not in world.draining
    left = [request_id for request_id, place in world.places.items() if place in world.draining]
    rooms = [NUM_PAGES - world.num_used(each) for each in world.workers if each not in world.draining]
    assert all(max(rooms) <= num_pages_of(world.tokens[request_id]) for request_id in left)


@settings(max_examples=150, deadline=None)
@given(worlds(num_draining=1))
def test_every_plan_has_one_move_from_each_worker_at_most(world: World) -> None:
    for _ in range(20):
        moves = world.round()
        assert len({move.source for move in moves}) == len(moves)
        assert all(move.source != move.target for move in moves)
        assert {move.reason for move in moves if move.source.worker_id in world.draining} <= {
            MoveReason.DRAIN
        }
