"""Under a flood that never ends, every request ends within a bound, whatever the policy and whoever its tenant is."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.policies import LONGEST_DEADLINE_S, POLICIES, Policy
from workers.request import Request, RequestId, SamplingParams, SessionId
from workers.scheduler import SchedulerLimits, schedule
from workers.state import EngineState, StateLimits
from workers.step import SampledToken, StepResult

NUM_PAGES = 6
MAX_PROMPT, MAX_OUTPUT, MIN_BATCHED = 20, 10, 3  # tokens
NUM_TENANTS, MAX_FLOOD = 3, 3
# Of one request that has the worker for itself, and again for what preemptions throw away.
MOST_STEPS_ALONE = 2 * (MAX_PROMPT // MIN_BATCHED + 1 + MAX_OUTPUT)
STEP_S = 3.0


@dataclass(frozen=True)
class Shape:
    num_prompt: int
    num_output: int
    weight: float
    deadline_s: float | None  # from its arrival


shapes = st.builds(
    Shape,
    num_prompt=st.integers(6, MAX_PROMPT),
    num_output=st.integers(1, MAX_OUTPUT),
    weight=st.sampled_from([1.0, 2.0]),
    deadline_s=st.sampled_from([None, -5.0, 1.0, 30.0]),
)


class Flood:
    """A worker of whose tenants each has `num_waiting` requests at any time, and that keeps count of their age."""

    def __init__(self, policy: Policy, flood: list[list[Shape]], limits: SchedulerLimits) -> None:
        self.state = EngineState(
            StateLimits(
                num_pages=NUM_PAGES, max_model_len=MAX_PROMPT + MAX_OUTPUT, vocab_size=10, eos_token_ids=frozenset(),
                model_fingerprint=b"model", max_num_waiting=100,
            ),
            policy=policy,
        )  # fmt: skip
        self.limits = limits
        self.now_s = 0.0
        self.began_s: dict[RequestId, float] = {}
        self.tenant_of: dict[RequestId, int] = {}
        self.flood = flood
        self.more: list[Iterator[int]] = [count() for _ in flood]

    def step(self) -> None:
        for tenant, tenant_shapes in enumerate(self.flood):
            while list(self.tenant_of.values()).count(tenant) < len(tenant_shapes):
                number = next(self.more[tenant])
                self.submit(tenant, number, tenant_shapes[number % len(tenant_shapes)])
        self.now_s += STEP_S
        plan = schedule(self.state.view(), self.limits)
        self.state.begin(plan, now_s=self.now_s)
        sampled = {row.request.request_id: SampledToken(5) for row in plan.rows if row.samples}
        for output in self.state.apply(plan, StepResult(sampled=sampled), now_s=self.now_s):
            if output.finish_reason is not None:
                del self.began_s[output.request_id], self.tenant_of[output.request_id]
        self.state.check()

    def submit(self, tenant: int, number: int, shape: Shape) -> None:
        request = Request(
            request_id=RequestId(f"t{tenant}-{number}"),
            session_id=SessionId(0),
            # No two share a block.
            prompt_token_ids=[tenant, *(int(digit) for digit in f"{number:05}"), *[1] * shape.num_prompt][
                : shape.num_prompt
            ],
            sampling=SamplingParams(max_tokens=shape.num_output, ignore_eos=True),
            arrival_s=self.now_s,
            tenant=f"t{tenant}",
            tenant_weight=shape.weight,
            deadline_s=None if shape.deadline_s is None else self.now_s + shape.deadline_s,
        )
        self.state.add(request, now_s=self.now_s)
        self.began_s[request.request_id] = self.now_s
        self.tenant_of[request.request_id] = tenant


# How many requests may go before one, or beside it: at most all that were there when it came, and
NUM_BEFORE = {
    "fcfs": MAX_FLOOD * NUM_TENANTS,
    "priority": MAX_FLOOD * NUM_TENANTS,
    # those that came in the time of the longest deadline,
    "deadline": MAX_FLOOD * NUM_TENANTS + int(LONGEST_DEADLINE_S / STEP_S),
    # or, of each other tenant, twice as many as of its own, by the weights, and one; each twice as costly as another.
    "fair": MAX_FLOOD + (NUM_TENANTS - 1) * (2 * 2 * MAX_FLOOD + 1),
}
NUM_STEPS = 1200  # more than any bound, so that one who starves is found


def flood_worker(worker: Flood, *, most_steps: int) -> None:
    for _ in range(NUM_STEPS):
        worker.step()
        oldest_s = min(worker.began_s.values(), default=worker.now_s)
        assert worker.now_s - oldest_s <= most_steps * STEP_S, "a request starves"


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(
    flood=st.lists(
        st.lists(shapes, min_size=1, max_size=MAX_FLOOD), min_size=NUM_TENANTS, max_size=NUM_TENANTS
    ),
    max_num_seqs=st.integers(1, 3),
    max_num_batched_tokens=st.integers(MIN_BATCHED, 40),
)
@settings(max_examples=8, deadline=None)
def test_every_request_of_every_tenant_ends_within_a_bound(
    policy: str, flood: list[list[Shape]], max_num_seqs: int, max_num_batched_tokens: int
) -> None:
    limits = SchedulerLimits(
        max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs, max_num_pulls=1
    )
    most_steps = (NUM_BEFORE[policy] + 1) * MOST_STEPS_ALONE
    flood_worker(Flood(POLICIES[policy], flood, limits), most_steps=most_steps)


def test_a_policy_that_starves_is_found_out() -> None:
    def last_come(request: Request, served: float) -> tuple[float, ...]:
        return (-request.arrival_s,)

    shape = Shape(num_prompt=10, num_output=3, weight=1.0, deadline_s=None)
    limits = SchedulerLimits(max_num_batched_tokens=10, max_num_seqs=1, max_num_pulls=1)
    with pytest.raises(AssertionError, match="a request starves"):
        flood_worker(Flood(last_come, [[shape] * 2] * 2, limits), most_steps=NUM_STEPS // 2)
