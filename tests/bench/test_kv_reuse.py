"""The book of a tier gives the hits that an independent simulation gave."""

from functools import cache

import pytest

from bench.kv_reuse import CAPACITIES_MTOKENS, DATA, EXPECTED, Prompt, mismatches, prompts, replay
from bench.mooncake import WORKLOADS, generate, read_trace

# The bench replays all of it; the conversations take seconds.
TRACED = [("conversation", 10), *(("synthetic", capacity) for capacity in CAPACITIES_MTOKENS)]


@cache
def trace(name: str) -> list[Prompt]:
    return prompts(read_trace(DATA / f"{name}_trace.jsonl"))


@cache
def generated(name: str) -> list[Prompt]:
    return prompts(generate(WORKLOADS[name], seed=1))


@pytest.mark.skipif(not DATA.exists(), reason="the traces are not here")
@pytest.mark.parametrize(("name", "capacity_mtokens"), TRACED)
def test_lru_hits_of_a_trace_are_those_of_the_reference(name: str, capacity_mtokens: int) -> None:
    reuse = replay(trace(name), capacity_tokens=capacity_mtokens * 1_000_000, policy="lru")
    assert round(reuse.hit_percent, 1) == EXPECTED[name][CAPACITIES_MTOKENS.index(capacity_mtokens)]


@pytest.mark.parametrize(("capacity_mtokens", "num_hits"), [(1, 21_982), (10, 79_515)])
def test_lru_hits_of_a_generated_workload_stay_what_they_were(capacity_mtokens: int, num_hits: int) -> None:
    reuse = replay(generated("synthetic"), capacity_tokens=capacity_mtokens * 1_000_000, policy="lru")
    assert reuse.num_hits == num_hits


def test_the_cost_aware_policy_saves_more_flops_where_memory_is_short() -> None:
    lru, cost = (
        replay(generated("synthetic"), capacity_tokens=1_000_000, policy=policy) for policy in ("lru", "cost")
    )
    assert cost.saved_flops > lru.saved_flops


def test_a_figure_that_is_not_the_reference_is_said_loudly() -> None:
    assert mismatches("conversation", [5.34, 13.6, 28.5, 36.4]) == []
    (said,) = mismatches("conversation", [5.36, 13.6, 28.5, 36.4])
    assert "5.36 % of conversation at 1 M tokens, must be 5.3" in said
