import pytest

from workers.policies import fair, priority
from workers.request import Request, RequestId, SamplingParams, SessionId
from workers.tenants import Tenants
from workers.waiting import WaitingQueue


def request(
    name: str, *, tenant: str = "", arrival_s: float = 0.0, num_tokens: int = 10, weight: float = 1.0
) -> Request:
    return Request(
        request_id=RequestId(name),
        session_id=SessionId(0),
        prompt_token_ids=[1] * num_tokens,
        sampling=SamplingParams(),
        arrival_s=arrival_s,
        tenant=tenant,
        tenant_weight=weight,
    )


def fair_queue(*requests: Request) -> tuple[WaitingQueue, Tenants]:
    tenants = Tenants()
    queue = WaitingQueue(fair, tenants)
    for each in requests:
        tenants.enter(each)
        queue.add(each)
    queue.check()
    return queue, tenants


def names(queue: WaitingQueue) -> list[str]:
    return [each.request_id for each in queue]


def test_a_flood_of_one_tenant_takes_every_other_place_beside_another_tenant() -> None:
    flood = [request(f"f{number}", tenant="flood", arrival_s=float(number)) for number in range(4)]
    other = [request(f"o{number}", tenant="other", arrival_s=10.0 + number) for number in range(2)]
    queue, _ = fair_queue(*flood, *other)
    assert names(queue) == ["f0", "o0", "f1", "o1", "f2", "f3"]


def test_places_follow_the_tokens_that_they_cost_and_the_weights() -> None:
    long = [request(f"l{number}", tenant="long", arrival_s=0.0, num_tokens=29) for number in range(2)]
    short = [
        request(f"s{number}", tenant="short", arrival_s=1.0 + number, num_tokens=9) for number in range(4)
    ]
    assert names(fair_queue(*long, *short)[0]) == ["l0", "s0", "s1", "s2", "l1", "s3"]
    heavy = [request(f"h{n}", tenant="heavy", arrival_s=0.0, num_tokens=29, weight=3.0) for n in range(2)]
    assert names(fair_queue(*heavy, *short)[0]) == ["h0", "s0", "h1", "s1", "s2", "s3"]


def test_the_tenant_that_was_served_less_is_first() -> None:
    one, other = request("one", tenant="one"), request("other", tenant="other", arrival_s=5.0)
    queue, tenants = fair_queue(one, other)
    tenants.charge(one, first_token=0, end_token=1, num_sampled=0)
    assert names(queue) == ["other", "one"]


def test_tenants_make_no_difference_to_a_policy_that_does_not_ask() -> None:
    tenants = Tenants()
    queue = WaitingQueue(priority, tenants)
    for number in (3, 1, 2, 0):
        each = request(f"r{number}", tenant=f"t{number % 2}", arrival_s=float(number))
        tenants.enter(each)
        queue.add(each)
    assert names(queue) == ["r0", "r1", "r2", "r3"]


def test_a_request_that_is_not_there_cannot_be_removed() -> None:
    here = request("here", tenant="a")
    queue, _ = fair_queue(here)
    with pytest.raises(AssertionError, match="not where its rank says"):
        queue.remove(request("here", tenant="a"))
    queue.remove(here)
    queue.check()
    assert (len(queue), names(queue)) == (0, [])


def test_who_is_put_first_is_next_until_it_has_gone() -> None:
    requests = [
        request(f"r{number}", tenant=f"t{number % 2}", arrival_s=float(number)) for number in range(4)
    ]
    queue, _ = fair_queue(*requests)
    in_turn = names(queue)
    queue.put_first(requests[3])
    assert names(queue) == ["r3", *(name for name in in_turn if name != "r3")]
    queue.remove(requests[3])
    queue.check()
    assert names(queue) == [name for name in in_turn if name != "r3"]
