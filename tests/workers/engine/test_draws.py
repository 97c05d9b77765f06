import numpy as np
import pytest

from kernels import sample
from workers.engine.draws import draws_of, uniform
from workers.request import SamplingParams


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63, 2**64 - 1])
def test_random_numbers_are_those_of_the_cpus_kernel(seed: int) -> None:
    numbers = np.arange(50, dtype=np.uint64)
    expected = sample.uniform(np.full(50, seed, dtype=np.uint64), numbers).tolist()
    assert [uniform(seed, number) for number in range(50)] == expected


def test_a_greedy_row_uses_nothing_of_the_row_before() -> None:
    drawn = SamplingParams(temperature=0.5, top_k=3, top_p=0.75, min_p=0.25, seed=9)
    draws = draws_of([(drawn, 4), (SamplingParams(temperature=0.0), 2)])
    assert draws.temperature.tolist() == [0.5, 0]
    assert draws.top_k.tolist() == [3, 0]
    assert draws.top_p.tolist() == [0.75, 1]
    assert draws.min_p.tolist() == [0.25, 0]
    assert draws.uniform.tolist() == [uniform(9, 4), 0]
