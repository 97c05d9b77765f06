from workers import tenants as module
from workers.request import Request, RequestId, SamplingParams, SessionId
from workers.tenants import MAX_CREDIT_TOKENS, Tenants

LONG = 10 * int(MAX_CREDIT_TOKENS)


def request(tenant: str, *, weight: float = 1.0) -> Request:
    return Request(
        request_id=RequestId("r"),
        session_id=SessionId(0),
        prompt_token_ids=[1] * 10,
        sampling=SamplingParams(),
        arrival_s=0.0,
        tenant=tenant,
        tenant_weight=weight,
    )


def test_a_prompt_token_costs_one_and_an_output_token_two() -> None:
    tenants, r = Tenants(), request("a")
    tenants.enter(r)
    tenants.charge(r, first_token=0, end_token=6, num_sampled=0)
    tenants.charge(r, first_token=6, end_token=10, num_sampled=1)
    assert tenants.served("a") == 10 + 1
    tenants.charge(r, first_token=10, end_token=11, num_sampled=1)
    assert tenants.served("a") == 10 + 2 + 1


def test_what_is_computed_again_or_was_cached_costs_nothing() -> None:
    tenants, r = Tenants(), request("a")
    tenants.enter(r)
    tenants.charge(r, first_token=4, end_token=8, num_sampled=0)
    tenants.charge(r, first_token=0, end_token=8, num_sampled=0)
    assert tenants.served("a") == 4
    tenants.charge(r, first_token=0, end_token=10, num_sampled=1)
    assert tenants.served("a") == 4 + 2 + 1


def test_twice_the_weight_halves_the_price() -> None:
    tenants, r = Tenants(), request("a", weight=2.0)
    tenants.enter(r)
    tenants.charge(r, first_token=0, end_token=10, num_sampled=0)
    assert tenants.served("a") == 5


def test_a_tenant_that_comes_back_has_saved_no_more_up_than_a_prompt() -> None:
    tenants, idle, busy = Tenants(), request("idle"), request("busy")
    tenants.enter(idle)
    tenants.leave(idle)
    tenants.enter(busy)
    tenants.charge(busy, first_token=0, end_token=LONG, num_sampled=0)
    tenants.enter(idle)
    assert tenants.served("idle") == LONG - MAX_CREDIT_TOKENS


def test_coming_and_going_earns_nothing_to_a_tenant_that_used_its_share() -> None:
    tenants, flickers, busy = Tenants(), request("flickers"), request("busy")
    tenants.enter(busy)
    tenants.charge(busy, first_token=0, end_token=LONG, num_sampled=0)
    tenants.enter(flickers)
    tenants.charge(flickers, first_token=0, end_token=int(MAX_CREDIT_TOKENS) + 7, num_sampled=0)
    tenants.leave(flickers)
    tenants.enter(flickers)
    assert tenants.served("flickers") == LONG + 7


def test_the_credit_of_twice_the_weight_is_as_many_tokens() -> None:
    tenants, heavy, busy = Tenants(), request("heavy", weight=2.0), request("busy")
    tenants.enter(busy)
    tenants.charge(busy, first_token=0, end_token=LONG, num_sampled=0)
    tenants.enter(heavy)
    tenants.charge(heavy, first_token=0, end_token=int(MAX_CREDIT_TOKENS), num_sampled=0)
    assert tenants.served("heavy") == LONG


def test_the_last_one_to_leave_is_a_prompt_behind_the_next_one_to_come_and_no_more() -> None:
    tenants, first, next_ = Tenants(), request("first"), request("next")
    tenants.enter(first)
    tenants.charge(first, first_token=0, end_token=LONG, num_sampled=0)
    tenants.leave(first)
    tenants.enter(next_)
    tenants.enter(first)
    assert tenants.served("first") - tenants.served("next") == MAX_CREDIT_TOKENS


def test_leaving_does_not_wash_off_what_a_tenant_was_served() -> None:
    tenants, greedy, modest = Tenants(), request("greedy"), request("modest")
    tenants.enter(modest)
    tenants.enter(greedy)
    tenants.charge(greedy, first_token=0, end_token=500, num_sampled=0)
    tenants.leave(greedy)
    tenants.enter(greedy)
    assert (tenants.served("greedy"), tenants.served("modest")) == (500, 0)


def test_tenants_without_number_are_not_all_remembered() -> None:
    tenants, stays = Tenants(), request("stays")
    tenants.enter(stays)
    for number in range(2 * module.MAX_REMEMBERED):
        passing = request(f"t{number}")
        tenants.enter(passing)
        tenants.charge(passing, first_token=0, end_token=number, num_sampled=0)
        tenants.leave(passing)
    assert len(tenants._served) <= module.MAX_REMEMBERED + 2
    tenants.enter(passing)
    assert (tenants.served(passing.tenant), tenants.served("stays")) == (number, 0)
