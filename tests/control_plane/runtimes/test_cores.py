from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.runtimes.cores import assign_cores, least_used_cores

core_sets = st.sets(st.integers(0, 255), min_size=1, max_size=64)


@settings(deadline=None)
@given(num_workers=st.integers(1, 64), cores=core_sets)
def test_workers_share_no_core_and_leave_none_idle_while_there_are_enough(
    num_workers: int, cores: set[int]
) -> None:
    assigned = assign_cores(num_workers, cores)
    used = [core for one in assigned for core in one]
    assert len(assigned) == num_workers
    assert set(used) <= cores
    if num_workers <= len(cores):
        assert sorted(used) == sorted(cores)
        sizes = {len(one) for one in assigned}
        assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(num_workers=st.integers(1, 200), cores=core_sets)
def test_more_workers_than_cores_are_spread_evenly(num_workers: int, cores: set[int]) -> None:
    assigned = assign_cores(num_workers + len(cores), cores)
    carried = Counter(core for (core,) in assigned)
    assert set(carried) == cores
    assert max(carried.values()) - min(carried.values()) <= 1


def test_neighbouring_cores_stay_together() -> None:
    assert assign_cores(2, [7, 3, 2, 6]) == [(2, 3), (6, 7)]


def test_no_workers_need_no_cores() -> None:
    assert assign_cores(0, [1, 2]) == []


@pytest.mark.parametrize("assign", [lambda: assign_cores(1, []), lambda: least_used_cores([], [])])
def test_no_cores_at_all_is_refused(assign: object) -> None:
    assert callable(assign)
    with pytest.raises(ValueError, match="at least one"):
        assign()


@settings(deadline=None)
@given(taken=st.lists(st.sampled_from([(0,), (1,), (2,), (3,)]), max_size=20))
def test_a_further_worker_gets_the_cores_that_carry_the_fewest(taken: list[tuple[int, ...]]) -> None:
    cores = range(4)
    carried = Counter(core for one in taken for core in one)
    chosen = least_used_cores(taken, cores)
    left = [carried[core] for core in cores if core not in chosen]
    assert chosen
    assert not left or max(carried[core] for core in chosen) <= min(left)
