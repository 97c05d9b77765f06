from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.placement import (
    ATTENTION_EQUALS_LINEAR_TOKENS,
    BUSY_S,
    GRACE_S,
    POLICIES,
    cost_class,
    retention_value,
    stretches,
)


def test_a_block_costs_more_the_longer_its_prefix_and_twice_where_attention_equals_the_rest() -> None:
    cost = POLICIES["cost"]
    assert cost(0) == 1.0
    assert cost(ATTENTION_EQUALS_LINEAR_TOKENS) == 2.0
    assert cost(5 * ATTENTION_EQUALS_LINEAR_TOKENS) == 6.0


def test_to_lru_all_blocks_cost_the_same() -> None:
    assert {POLICIES["lru"](first_token) for first_token in (0, 16, 10**6)} == {1.0}


@given(st.floats(1.0, 1e6), st.floats(1.0, 1e6))
def test_classes_are_in_the_order_of_costs_and_few(one: float, other: float) -> None:
    assert (cost_class(one) <= cost_class(other)) or one > other
    assert 0 <= cost_class(one) <= 80


@pytest.mark.parametrize("of_class", [0, 7])
def test_the_value_of_a_block_never_rises_with_the_time_since_its_last_use(of_class: int) -> None:
    idle_s = [0.0, 0.1, BUSY_S - 0.1, BUSY_S, GRACE_S, 2 * GRACE_S, 100 * GRACE_S]
    values = [retention_value(of_class, idle_s=seconds) for seconds in idle_s]
    assert values == sorted(values, reverse=True)


def test_a_block_in_use_outlives_a_costly_one_that_is_not() -> None:
    costly = cost_class(8.0)
    assert retention_value(0, idle_s=1.0) > retention_value(costly, idle_s=BUSY_S)


def test_twice_the_cost_keeps_a_block_for_twice_the_time() -> None:
    one_octave = cost_class(2.0)
    assert retention_value(one_octave, idle_s=200.0) == retention_value(0, idle_s=100.0 - GRACE_S / 2)


@given(st.lists(st.booleans(), max_size=40))
def test_stretches_are_the_longest_runs_of_what_is_wanted(wanted: list[bool]) -> None:
    found = stretches(wanted)
    assert [any(start <= i < stop for start, stop in found) for i in range(len(wanted))] == wanted
    assert all(start < stop for start, stop in found)
    assert all(before[1] < after[0] for before, after in pairwise(found))
