"""What each policy guarantees, of requests of any two tenants."""

from typing import Any

import pytest

from workers.policies import LONGEST_DEADLINE_S, POLICIES, deadline, fair, fcfs, priority, rank
from workers.request import Request, RequestId, SamplingParams, SessionId


def request(name: str = "r", *, arrival_s: float, **fields: Any) -> Request:
    return Request(
        request_id=RequestId(name),
        session_id=SessionId(0),
        prompt_token_ids=[1],
        sampling=SamplingParams(),
        arrival_s=arrival_s,
        **fields,
    )


def test_fcfs_serves_whoever_came_first_whatever_they_say() -> None:
    early = request(arrival_s=1.0, priority=5, deadline_s=90.0)
    late = request(arrival_s=2.0, priority=-5, deadline_s=3.0)
    assert fcfs(early, 1000.0) < fcfs(late, 0.0)


def test_priority_serves_the_lower_class_first_and_then_whoever_came_first() -> None:
    urgent = request(arrival_s=9.0, priority=-1)
    early, late = request(arrival_s=1.0), request(arrival_s=2.0)
    assert priority(urgent, 9.0) < priority(early, 9.0) < priority(late, 0.0)


def test_fair_serves_the_class_first_then_the_tenant_served_least_then_whoever_came_first() -> None:
    early, late = request(arrival_s=1.0), request(arrival_s=2.0)
    assert fair(request(arrival_s=9.0, priority=-1), 1000.0) < fair(late, 0.0)
    assert fair(late, 10.0) < fair(early, 11.0)
    assert fair(early, 10.0) < fair(late, 10.0)


def test_deadline_serves_the_class_first_then_the_earliest_deadline_then_whoever_came_first() -> None:
    soon, later = request(arrival_s=2.0, deadline_s=5.0), request(arrival_s=1.0, deadline_s=6.0)
    assert deadline(request(arrival_s=9.0, priority=-1), 0.0) < deadline(soon, 0.0) < deadline(later, 0.0)
    assert deadline(request(arrival_s=1.0, deadline_s=6.0), 0.0) < deadline(
        request(arrival_s=2.0, deadline_s=6.0), 0.0
    )


@pytest.mark.parametrize("deadline_s", [None, 1e9])
def test_nobody_is_passed_by_a_deadline_of_one_that_came_much_later(deadline_s: float | None) -> None:
    patient = request(arrival_s=100.0, deadline_s=deadline_s)
    missed = request(arrival_s=100.0 + LONGEST_DEADLINE_S + 0.1, deadline_s=1.0)
    assert deadline(patient, 0.0) < deadline(missed, 0.0)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_no_two_requests_have_one_rank(name: str) -> None:
    one, other = request("one", arrival_s=1.0), request("other", arrival_s=1.0)
    assert rank(POLICIES[name], one, 0.0) != rank(POLICIES[name], other, 0.0)
