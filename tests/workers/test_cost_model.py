import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.cost_model import CopyRate, CostModel

STEP_TOKENS = 512
coefficients = st.tuples(st.floats(1e-4, 2e-2), st.floats(1e-6, 2e-3), st.floats(1e-10, 1e-6))


def pairs(first: int, count: int) -> float:
    return sum(position + 1 for position in range(first, first + count))


def step_s(of: tuple[float, float, float], rows: list[tuple[int, int]]) -> float:
    tokens = sum(count for _, count in rows)
    return of[0] + of[1] * tokens + of[2] * sum(pairs(first, count) for first, count in rows)


def prefill_steps(num_prompts: int, *, seed: int = 0) -> list[list[tuple[int, int]]]:
    """Prompts of some length each, in steps of 512 tokens, with decodes beside them."""
    rng = random.Random(seed)
    steps = []
    for _ in range(num_prompts):
        length = rng.randrange(32, 4096)
        for first in range(0, length, STEP_TOKENS):
            decodes = [(rng.randrange(10, 4000), 1) for _ in range(rng.randrange(4))]
            steps.append([(first, min(STEP_TOKENS, length - first)), *decodes])
    return steps


def learned(of: tuple[float, float, float], steps: list[list[tuple[int, int]]]) -> CostModel:
    model = CostModel(tokens_per_step=STEP_TOKENS)
    for rows in steps:
        model.observe(rows, step_s=step_s(of, rows))
        model.check()
    return model


def test_before_the_first_step_nothing_is_known() -> None:
    assert CostModel(tokens_per_step=STEP_TOKENS).seconds(0, 16) is None


def test_one_step_is_enough_for_a_first_guess() -> None:
    model = CostModel(tokens_per_step=STEP_TOKENS)
    model.observe([(0, 256)], step_s=0.256)
    assert model.seconds(0, 1000) == pytest.approx(1.0, rel=0.1)


@given(coefficients)
def test_it_finds_what_steps_cost(of: tuple[float, float, float]) -> None:
    model = learned(of, prefill_steps(40))
    for first, count in ((0, 512), (3584, 512), (1024, 512)):
        assert model.seconds(first, count) == pytest.approx(step_s(of, [(first, count)]), rel=0.03)


def test_noise_and_outliers_move_it_little() -> None:
    of = (2e-3, 2e-4, 2e-8)
    rng = random.Random(1)
    model = CostModel(tokens_per_step=STEP_TOKENS)
    for number, rows in enumerate(prefill_steps(60)):
        took_s = step_s(of, rows) * rng.uniform(0.95, 1.05)
        model.observe(rows, step_s=took_s * 30 if number % 10 == 9 else took_s)
    exact_s = sum(step_s(of, [(first, STEP_TOKENS)]) for first in range(0, 4096, STEP_TOKENS))
    assert model.seconds(0, 4096) == pytest.approx(exact_s, rel=0.3)


def test_it_follows_an_engine_that_becomes_slower() -> None:
    of = (2e-3, 2e-4, 2e-8)
    model = learned(of, prefill_steps(60))
    for rows in prefill_steps(60, seed=2):
        model.observe(rows, step_s=3 * step_s(of, rows))
    assert model.seconds(0, STEP_TOKENS) == pytest.approx(3 * step_s(of, [(0, STEP_TOKENS)]), rel=0.15)


def test_decodes_alone_say_nothing_about_prompts() -> None:
    model = CostModel(tokens_per_step=STEP_TOKENS)
    model.observe([(100, 1), (200, 1)], step_s=0.5)
    model.observe([], step_s=0.5)
    assert model.seconds(0, 16) is None


@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 8192)), max_size=4),
            st.floats(0, 1e3, allow_subnormal=False),
        ),
        max_size=30,
    ),
    st.integers(0, 10**6),
    st.integers(0, 10**5),
)
def test_no_cost_is_ever_negative(
    steps: list[tuple[list[tuple[int, int]], float]], first: int, count: int
) -> None:
    model = CostModel(tokens_per_step=STEP_TOKENS)
    for rows, took_s in steps:
        model.observe(rows, step_s=took_s)
        model.check()
    seconds = model.seconds(first, count)
    assert seconds is None or 0.0 <= seconds < float("inf")


@given(coefficients, st.integers(0, 4096), st.integers(0, 4096), st.integers(0, 4096))
def test_ranges_that_touch_add_up(of: tuple[float, float, float], first: int, count: int, more: int) -> None:
    model = learned(of, prefill_steps(3))
    parts = [model.seconds(first, count), model.seconds(first + count, more)]
    whole = model.seconds(first, count + more)
    assert None not in parts
    assert whole == pytest.approx(sum(part for part in parts if part is not None))


def test_a_step_without_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="tokens_per_step must be at least 1, got 0"):
        CostModel(tokens_per_step=0)


def test_the_rate_of_copies_follows_those_made_and_one_in_no_time_says_nothing() -> None:
    rate = CopyRate(prior_bytes_s=1e9)
    assert rate.seconds(1_000_000) == pytest.approx(0.001)
    for _ in range(100):
        rate.observe(1_000_000, copy_s=0.004)
    assert rate.seconds(1_000_000) == pytest.approx(0.004, rel=0.01)
    rate.observe(1_000_000, copy_s=0.0)
    assert rate.seconds(1_000_000) == pytest.approx(0.004, rel=0.01)
    rate.observe(1_000_000, copy_s=1e-9)
    assert rate.seconds(1_000_000) > 0.003
