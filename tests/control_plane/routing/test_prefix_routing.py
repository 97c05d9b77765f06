"""What routing promises about prefixes that somebody holds."""

from collections import Counter
from dataclasses import replace

import pytest

from control_plane.directory.member import Incarnation, Role, WorkerId, WorkerLoad
from control_plane.directory.overlap import Overlap
from control_plane.routing.holders import MAX_HOLDERS
from control_plane.routing.policy import RoutingPolicy
from control_plane.routing.router import route
from control_plane.routing.scorers import SCORERS, tokens_saved
from control_plane.routing.view import ClusterView, Placement, RoutingRequest, WorkerView

WEIGHTS = {"prefix_overlap": 2.0, "queue": 1.0, "free_pages": 1.0}
POLICY = RoutingPolicy(prefill_threshold_tokens=64, weights=WEIGHTS)
LOAD = WorkerLoad(num_pages=1000, num_free_pages=1000)


def name(worker_id: str) -> Incarnation:
    return Incarnation(WorkerId(worker_id), 1)


def worker(worker_id: str, role: Role = Role.MIXED, **fields: object) -> WorkerView:
    defaults = {"incarnation": name(worker_id), "role": role, "model_fingerprint": b"m", "load": LOAD}
    return WorkerView(**{**defaults, **fields})


def request(num_tokens: int = 2048, **overlaps: Overlap) -> RoutingRequest:
    return RoutingRequest(
        num_prompt_tokens=num_tokens,
        overlaps={WorkerId(worker_id.replace("_", "-")): overlap for worker_id, overlap in overlaps.items()},
    )


def device(num_blocks: int) -> Overlap:
    return Overlap(num_device_blocks=num_blocks)


def place(asked: RoutingRequest, *workers: WorkerView, policy: RoutingPolicy = POLICY) -> Placement:
    placement = route(asked, ClusterView(workers), policy)
    assert isinstance(placement, Placement), placement
    return placement


def hints(placement: Placement) -> list[tuple[str, int]]:
    return [(holding.holder.worker_id, holding.num_blocks) for holding in placement.kv_holders]


def test_without_load_the_holder_of_a_prefix_is_chosen_however_short_it_is() -> None:
    for num_blocks in (1, 4, 128):
        assert place(request(b=device(num_blocks)), worker("a"), worker("b")).decode == name("b")


def test_a_faster_tier_is_better() -> None:
    tiers = {
        "device": Overlap(num_device_blocks=64),
        "memory": Overlap(num_memory_blocks=64),
        "disk": Overlap(num_disk_blocks=64),
    }
    workers = [worker(worker_id) for worker_id in ("a-peer", "disk", "memory", "device")]
    asked = request(**tiers)
    for best in ("device", "memory", "disk"):
        assert place(asked, *workers).decode == name(best)
        workers.pop()


def test_more_tokens_on_disk_are_better_than_few_in_device_pages() -> None:
    asked = request(few=device(32), many=Overlap(num_disk_blocks=100))
    assert place(asked, worker("few"), worker("many")).decode == name("many")


def test_never_more_is_saved_than_there_is() -> None:
    assert tokens_saved(WorkerId("w"), request(100, w=device(64))) == 100
    assert tokens_saved(WorkerId("other"), request(100, w=device(64))) == 100


def test_when_the_holder_is_busy_another_is_chosen_and_told_where_to_fetch() -> None:
    busy = worker("holder", num_assigned=40)
    placement = place(request(holder=device(120)), busy, worker("idle"))
    assert placement.decode == name("idle")
    assert hints(placement) == [("holder", 120)]
    assert placement.num_uncached_tokens == 2048


def test_the_chosen_holder_is_told_of_those_with_more_than_it_has() -> None:
    asked = request(w=device(100), longer=device(110), equal=device(100))
    busy = {"num_assigned": 60}
    placement = place(asked, worker("w"), worker("longer", **busy), worker("equal", **busy))
    assert placement.decode == name("w")
    assert hints(placement) == [("longer", 110)]
    assert placement.num_uncached_tokens == 2048 - 1600


def test_hints_are_few_and_best_first() -> None:
    asked = request(
        longest=Overlap(num_disk_blocks=90),
        disk=Overlap(num_disk_blocks=80),
        fast=device(80),
        idle=device(80),
        short=device(5),
    )
    holders = (
        worker("longest", num_assigned=90),
        worker("disk", num_assigned=60),
        worker("fast", num_assigned=80),
        worker("idle", num_assigned=60),
        worker("short", num_assigned=60),
        worker("dead", is_healthy=False),
    )
    placement = place(asked, worker("chosen"), *holders)
    assert placement.decode == name("chosen")
    assert hints(placement) == [("longest", 90), ("idle", 80), ("fast", 80)]
    assert len(placement.kv_holders) == MAX_HOLDERS


def test_who_failed_this_request_or_cannot_be_reached_is_no_hint() -> None:
    asked = replace(request(failed=device(80), away=device(80)), excluded=frozenset({name("failed")}))
    placement = place(asked, worker("w"), worker("failed"), worker("away", is_healthy=False))
    assert hints(placement) == []


def test_who_has_another_model_is_no_hint() -> None:
    asked = request(other=device(80), store=device(70))
    other = worker("other", model_fingerprint=b"other", num_assigned=90)
    placement = place(asked, worker("w"), other, worker("store", Role.STORE, model_fingerprint=b""))
    assert (placement.decode, hints(placement)) == (name("w"), [("store", 70)])


def test_a_store_is_never_routed_to_but_hinted_at() -> None:
    store = worker("store", Role.STORE)
    placement = place(request(store=device(128)), worker("w"), store)
    assert (placement.decode, placement.prefill) == (name("w"), None)
    assert hints(placement) == [("store", 128)]
    for workers in (
        (worker("d", Role.DECODE), store),
        (worker("d", Role.DECODE), worker("p", Role.PREFILL), store),
    ):
        placement = place(request(store=device(128)), *workers)
        assert name("store") not in (placement.decode, placement.prefill)


def test_hints_are_for_the_prefill_worker_if_there_is_one() -> None:
    asked = request(d=device(50), p0=device(100), p1=device(80))
    pool = (worker("p0", Role.PREFILL, num_assigned=90), worker("p1", Role.PREFILL))
    placement = place(asked, worker("d", Role.DECODE), *pool)
    assert (placement.prefill, hints(placement)) == (name("p1"), [("p0", 100)])
    assert placement.num_uncached_tokens == 2048 - 80 * 16


@pytest.mark.parametrize("tier", ["num_device_blocks", "num_memory_blocks", "num_disk_blocks"])
def test_what_the_decode_worker_has_in_any_tier_of_its_own_counts_as_cached(tier: str) -> None:
    workers = (worker("d", Role.DECODE), worker("p", Role.PREFILL))
    assert place(request(d=Overlap(**{tier: 127})), *workers).prefill is None
    assert place(request(d=Overlap(**{tier: 100})), *workers).prefill == name("p")


def test_what_others_hold_does_not_count_as_cached_at_the_decode_worker() -> None:
    workers = (worker("d", Role.DECODE), worker("p", Role.PREFILL), worker("s", Role.STORE))
    placement = place(request(s=device(128)), *workers)
    assert (placement.prefill, hints(placement)) == (name("p"), [("s", 128)])


def test_a_conversation_stays_where_it_is_while_load_is_even() -> None:
    num_blocks = 20
    for turn in range(8):
        others = {f"w{number}": 20 + (turn + number) % 5 for number in range(8)}
        workers = [worker(worker_id, num_assigned=count) for worker_id, count in others.items()]
        asked = request(num_tokens=num_blocks * 16 + 100, w3=device(num_blocks))
        assert place(asked, *workers).decode == name("w3")
        num_blocks += 20


@pytest.mark.parametrize("num_workers", [2, 4, 16])
@pytest.mark.parametrize("weight", [0.5, 2.0, 1000.0])
@pytest.mark.parametrize("caches", [True, False])
def test_one_hot_prefix_does_not_melt_its_holder(num_workers: int, weight: float, caches: bool) -> None:
    """However much the prefix counts, and even if nobody who fetches it can keep it."""
    policy = replace(POLICY, weights={**WEIGHTS, "prefix_overlap": weight})
    holders = {"w0"}
    assigned: Counter[str] = Counter()
    for number in range(1, 64 * num_workers + 1):
        workers = [
            worker(f"w{each}", num_assigned=assigned[f"w{each}"], last_pick=number if each == 0 else 0)
            for each in range(num_workers)
        ]
        chosen = place(
            request(**dict.fromkeys(holders, device(127))), *workers, policy=policy
        ).decode.worker_id
        assigned[chosen] += 1
        if caches:
            holders.add(chosen)
    mean = 64
    assert len(assigned) == num_workers
    assert max(assigned.values()) <= 2 * mean + 16
    assert min(assigned.values()) >= mean / 4


def test_short_overlaps_do_not_gather_requests() -> None:
    """A system prompt that everybody has in common must not decide alone."""
    busy = worker("w0", num_assigned=4)
    assert place(request(w0=device(4)), busy, worker("w1")).decode == name("w1")


def test_every_score_depends_on_nothing_but_its_arguments() -> None:
    asked, view = request(w=device(3)), worker("w", num_assigned=3)
    assert {scorer(view, asked) for scorer in SCORERS.values()} == {
        scorer(view, asked) for scorer in SCORERS.values()
    }
