from collections.abc import Mapping
from dataclasses import replace

import pytest

from control_plane.directory.member import Incarnation, Role, WorkerId, WorkerLoad
from control_plane.directory.overlap import Overlap
from control_plane.routing.policy import RoutingPolicy
from control_plane.routing.router import route
from control_plane.routing.scorers import SCORERS
from control_plane.routing.view import ClusterView, NoPlacement, Placement, RoutingRequest, WorkerView
from kvstore.blocks import BLOCK_SIZE_TOKENS

POLICY = RoutingPolicy(prefill_threshold_tokens=64, max_waiting=10, weights=dict.fromkeys(SCORERS, 1.0))
MODEL = b"model-a"


def worker(
    worker_id: str,
    role: Role = Role.DECODE,
    *,
    num_waiting: int = 0,
    num_free_pages: int = 100,
    **fields: object,
) -> WorkerView:
    defaults: dict[str, object] = {
        "incarnation": name(worker_id),
        "role": role,
        "model_fingerprint": MODEL,
        "load": WorkerLoad(num_waiting=num_waiting, num_pages=100, num_free_pages=num_free_pages),
    }
    return WorkerView(**{**defaults, **fields})


def name(worker_id: str, *, epoch: int = 1) -> Incarnation:
    return Incarnation(WorkerId(worker_id), epoch)


def request(
    num_prompt_tokens: int = 1000, *, cached: Mapping[str, int] | None = None, **fields: object
) -> RoutingRequest:
    overlaps = {
        WorkerId(worker_id): Overlap(num_device_blocks=num_tokens // BLOCK_SIZE_TOKENS)
        for worker_id, num_tokens in (cached or {}).items()
    }
    return RoutingRequest(num_prompt_tokens=num_prompt_tokens, **{"overlaps": overlaps, **fields})


def place(asked: RoutingRequest, *workers: WorkerView, policy: RoutingPolicy = POLICY) -> Placement:
    placement = route(asked, ClusterView(workers), policy)
    assert isinstance(placement, Placement), placement
    return placement


def who(placement: Placement) -> tuple[str, str | None]:
    return placement.decode.worker_id, placement.prefill.worker_id if placement.prefill else None


def test_a_long_prompt_is_prefilled_by_a_prefill_worker() -> None:
    placement = place(request(64), worker("d"), worker("p", Role.PREFILL))
    assert placement == Placement(decode=name("d"), prefill=name("p"), num_uncached_tokens=64)


def test_a_short_prompt_is_computed_where_it_decodes() -> None:
    assert place(request(63), worker("d"), worker("p", Role.PREFILL)).prefill is None


def test_only_what_the_decode_worker_has_not_cached_counts_as_long() -> None:
    workers = (worker("d"), worker("p", Role.PREFILL))
    assert place(request(1000, cached={"d": 944}), *workers).prefill is None
    assert place(request(1000, cached={"d": 928}), *workers).prefill == name("p")


def test_a_request_with_output_is_not_handed_over() -> None:
    placement = place(request(can_hand_over=False), worker("d"), worker("p", Role.PREFILL))
    assert placement.prefill is None


def test_without_a_prefill_worker_the_decode_worker_computes_the_prompt() -> None:
    assert who(place(request(), worker("d"))) == ("d", None)


def test_a_prefill_worker_that_cannot_serve_is_as_good_as_none() -> None:
    for prefill in (
        worker("p", Role.PREFILL, is_healthy=False),
        worker("p", Role.PREFILL, is_draining=True),
        worker("p", Role.PREFILL, num_waiting=10),
        worker("p", Role.PREFILL, model_fingerprint=b"other"),
    ):
        assert place(request(), worker("d"), prefill).prefill is None
    assert (
        place(request(excluded=frozenset({name("p")})), worker("d"), worker("p", Role.PREFILL)).prefill
        is None
    )


def test_a_mixed_worker_serves_alone() -> None:
    assert who(place(request(), worker("m", Role.MIXED))) == ("m", None)


def test_mixed_workers_do_not_hand_over_to_each_other() -> None:
    placement = place(request(), worker("m0", Role.MIXED), worker("m1", Role.MIXED))
    assert placement.prefill is None


def test_a_mixed_worker_prefills_for_a_decode_worker_if_nobody_else_does() -> None:
    busy = worker("m", Role.MIXED, num_free_pages=0)
    assert who(place(request(), worker("d"), busy)) == ("d", "m")
    assert place(request(), worker("d"), busy, worker("p", Role.PREFILL)).prefill == name("p")


@pytest.mark.parametrize(
    ("workers", "reason"),
    [
        ((), NoPlacement.NO_DECODE_WORKER),
        ((worker("p", Role.PREFILL),), NoPlacement.NO_DECODE_WORKER),
        ((worker("d", model_fingerprint=b"other"),), NoPlacement.OTHER_MODEL),
        ((worker("d", is_healthy=False),), NoPlacement.UNHEALTHY),
        ((worker("d", is_draining=True),), NoPlacement.DRAINING),
        ((worker("d", is_draining=True), worker("e", is_healthy=False)), NoPlacement.DRAINING),
        ((worker("failed"),), NoPlacement.ALL_FAILED),
        ((worker("d", num_waiting=10),), NoPlacement.OVERLOADED),
        ((worker("failed"), worker("d", is_healthy=False)), NoPlacement.ALL_FAILED),
    ],
)
def test_says_why_nobody_can_serve(workers: tuple[WorkerView, ...], reason: NoPlacement) -> None:
    asked = request(model_fingerprint=MODEL, excluded=frozenset({name("failed")}))
    assert route(asked, ClusterView(workers), POLICY) is reason


def test_another_incarnation_of_a_failed_worker_is_a_new_worker() -> None:
    asked = request(excluded=frozenset({name("d", epoch=1)}))
    assert place(asked, worker("d", incarnation=name("d", epoch=2))).decode == name("d", epoch=2)


def test_a_cached_prefix_outweighs_a_little_load() -> None:
    placement = place(request(cached={"warm": 900}), worker("cold"), worker("warm", num_assigned=4))
    assert placement.decode == name("warm")


def test_load_outweighs_a_short_cached_prefix() -> None:
    busy = worker("warm", num_assigned=64, num_free_pages=10)
    assert place(request(cached={"warm": 16}), worker("cold"), busy).decode == name("cold")


def test_a_weight_of_zero_switches_a_scorer_off() -> None:
    policy = replace(POLICY, weights={"prefix_overlap": 0.0, "queue": 1.0, "free_pages": 1.0})
    workers = (worker("cold"), worker("warm", num_assigned=4))
    assert place(request(cached={"warm": 900}), *workers, policy=policy).decode == name("cold")


def test_requests_of_a_burst_spread_although_no_worker_has_reported_yet() -> None:
    assigned = {"d0": 0, "d1": 0, "d2": 0}
    for number in range(1, 31):
        workers = (
            worker(worker_id, num_assigned=count, num_unreported_tokens=100 * count, last_pick=0)
            for worker_id, count in assigned.items()
        )
        assigned[place(request(number % 7 + 1), *workers).decode.worker_id] += 1
    assert set(assigned.values()) == {10}


def test_equals_take_turns_and_then_go_by_name() -> None:
    assert place(request(), worker("b"), worker("a")).decode == name("a")
    assert place(request(), worker("b", last_pick=3), worker("a", last_pick=4)).decode == name("b")


def test_the_order_of_the_view_does_not_matter() -> None:
    workers = [worker(f"d{n}", num_waiting=n % 3, last_pick=n % 4) for n in range(8)]
    assert place(request(), *workers) == place(request(), *reversed(workers))


def test_scores_stay_between_zero_and_one() -> None:
    extremes = (
        worker("d"),
        worker("d", load=WorkerLoad()),
        worker("d", num_assigned=10**6, num_unreported_tokens=10**9, num_unreported_pages=10**6),
        worker("d", load=WorkerLoad(num_running=10**6, num_waiting=10**6, num_waiting_tokens=10**12)),
    )
    for view in extremes:
        for asked in (request(0), request(10, cached={"d": 10**6})):
            for scorer_name, scorer in SCORERS.items():
                assert 0.0 <= scorer(view, asked) <= 1.0, scorer_name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prefill_threshold_tokens": -1}, "prefill_threshold_tokens must not be negative, got -1"),
        ({"max_waiting": 0}, "max_waiting must be at least 1, got 0"),
        ({"weights": {"luck": 1.0}}, "no scorer 'luck'; there are prefix_overlap, queue, free_pages"),
        ({"weights": {"queue": -1.0}}, "must not be negative"),
        ({"weights": {"queue": 0.0}}, "nor all 0"),
    ],
)
def test_a_policy_that_cannot_work_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(POLICY, **fields)
