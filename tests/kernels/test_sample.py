import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sample import Draws, reference, sample, uniform


def new_draws(
    num_rows: int,
    *,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    uniforms: float | Sequence[float] | np.ndarray = 0.5,
) -> Draws:
    def full(value: object, dtype: type) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, dtype), num_rows).copy()

    return Draws(
        temperature=full(temperature, np.float64),
        top_k=full(top_k, np.int64),
        top_p=full(top_p, np.float64),
        min_p=full(min_p, np.float64),
        uniform=full(uniforms, np.float64),
    )


def normal_logits(num_rows: int, vocab_size: int, *, seed: int = 0, rounded: bool = False) -> torch.Tensor:
    logits = torch.randn((num_rows, vocab_size), generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if rounded else logits


@settings(deadline=None, max_examples=200)
@given(
    vocab_size=st.integers(1, 3000),
    seed=st.integers(0, 2**32 - 1),
    rounded=st.booleans(),
    masked=st.sampled_from([0.0, 0.0, 0.5, 0.99]),
)
def test_the_kernel_draws_what_the_formulas_say(
    vocab_size: int, seed: int, rounded: bool, masked: float
) -> None:
    rng = np.random.default_rng(seed)
    num_rows = 8
    logits = normal_logits(num_rows, vocab_size, seed=seed, rounded=rounded)
    hidden = torch.from_numpy(rng.random((num_rows, vocab_size)) < masked)
    hidden[:, rng.integers(vocab_size)] = False
    logits = logits.masked_fill(hidden, -torch.inf)
    draws = Draws(
        temperature=rng.choice([0.0, 1e-3, 0.3, 1.0, 20.0], num_rows),
        top_k=rng.choice([0, 1, 5, 64, 1000, vocab_size, 2**31 - 1], num_rows),
        top_p=rng.choice([0.0, 0.1, 0.5, 0.9, 0.999, 1.0], num_rows),
        min_p=rng.choice([0.0, 1e-3, 0.1, 1.0], num_rows),
        uniform=rng.choice([0.0, rng.random(), np.nextafter(1.0, 0.0)], num_rows),
    )
    assert sample(logits, draws).tolist() == reference(logits, draws).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0),
        (7, 1.0, 0.0),
        (0, 0.8, 0.0),
        (0, 1.0, 0.1),
        (40, 0.95, 0.02),
        (3, 0.3, 0.5),
        (0, 0.0, 0.0),
    ],
)
def test_the_tokens_that_can_be_drawn_and_how_often_agree_with_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    vocab_size, num_draws = 50, 20_000
    logits = normal_logits(1, vocab_size, seed=3)
    processors = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(transformers.TopPLogitsWarper(top_p))
    if min_p:
        processors.append(transformers.MinPLogitsWarper(min_p))
    expected = processors(None, logits.double()).softmax(dim=1)[0]
    # Evenly spaced draws: the frequencies are the probabilities, to within one draw at each end.
    draws = new_draws(
        num_draws,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        uniforms=(np.arange(num_draws) + 0.5) / num_draws,
    )
    tokens = sample(logits.expand(num_draws, -1), draws)
    frequency = torch.bincount(tokens, minlength=vocab_size) / num_draws
    assert (frequency - expected).abs().max() <= 2 / num_draws
    assert not frequency[expected == 0].any()


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert sample(logits, new_draws(2, temperature=0.0)).tolist() == [1, 0]


def test_exactly_k_of_many_equals_are_kept_the_lowest_ids() -> None:
    logits = torch.zeros(1000, 100)
    draws = new_draws(1000, top_k=3, uniforms=np.arange(1000) / 1000)
    assert set(sample(logits, draws).tolist()) == {0, 1, 2}


def test_rows_do_not_depend_on_each_other() -> None:
    logits = normal_logits(12, 500)
    rng = np.random.default_rng(1)
    temperature, top_k = rng.choice([0.0, 1.0], 12), rng.choice([0, 10], 12)
    top_p, u = rng.choice([0.7, 1.0], 12), rng.random(12)
    together = sample(logits, new_draws(12, temperature=temperature, top_k=top_k, top_p=top_p, uniforms=u))
    alone = [
        sample(
            logits[i : i + 1],
            new_draws(1, temperature=temperature[i], top_k=top_k[i], top_p=top_p[i], uniforms=u[i]),
        ).item()
        for i in range(12)
    ]
    assert together.tolist() == alone


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 100.0])
def test_extreme_temperatures_and_logits_draw_a_token_that_exists(temperature: float) -> None:
    logits = torch.tensor(
        [[-torch.inf, 3e38, -3e38, -torch.inf], [-torch.inf, -3e38, -torch.inf, -torch.inf]]
    )
    for top_p in (0.5, 1.0):
        draws = new_draws(2, temperature=temperature, top_p=top_p, uniforms=0.999)
        assert sample(logits, draws).tolist() == [1, 1]


@pytest.mark.parametrize("num_bad", [1, 700, 2000])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.5, "min_p": 0.1}]
)
def test_rows_that_are_no_numbers_draw_some_token_and_touch_no_other_row(
    num_bad: int, bad: float, filters: dict[str, Any]
) -> None:
    vocab_size = 2000
    logits = normal_logits(3, vocab_size)
    expected = sample(logits, new_draws(3, **filters))
    logits[1, :num_bad] = bad
    for uniforms in (0.0, 0.999):
        token = sample(logits, new_draws(3, uniforms=uniforms, **filters))[1]
        assert 0 <= token < vocab_size
    tokens = sample(logits, new_draws(3, **filters))
    assert tokens[[0, 2]].tolist() == expected[[0, 2]].tolist()


def test_logits_are_left_as_they_were() -> None:
    logits = normal_logits(4, 100)
    before = logits.clone()
    sample(logits, new_draws(4, top_k=5, top_p=0.5, min_p=0.1))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "logits", [torch.zeros(3), torch.zeros(2, 3), torch.zeros(1, 3, dtype=torch.float64)]
)
def test_logits_of_another_shape_or_type_are_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="logits"):
        sample(logits, new_draws(1))


def test_uniforms_are_those_of_the_published_generator() -> None:
    """SplitMix64 in plain integers, as published, from the state that the docstring names."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    # First outputs for the seeds 0 and 1234567, known from other implementations.
    assert mix(gamma) == 0xE220A8397B1DCDAF
    assert mix((1234567 + gamma) % 2**64) == 6457827717110365317
    seeds, numbers = [0, 1, 2**64 - 1, 1234567], [0, 1, 7, 100_000]
    expected = []
    for seed, number in zip(seeds, numbers, strict=True):
        state = mix((seed + gamma) % 2**64)
        expected.append((mix((state + (number + 1) * gamma) % 2**64) >> 11) / 2**53)
    assert uniform(np.array(seeds, np.uint64), np.array(numbers, np.uint64)).tolist() == expected


def test_uniforms_never_change_between_versions() -> None:
    got = uniform(np.array([0, 0, 42], np.uint64), np.array([0, 1, 5], np.uint64))
    assert got.tolist() == [0.6524484863740322, 0.7012121095215252, 0.06751034237814979]


@pytest.mark.parametrize("vary", ["seed", "number"])
def test_uniforms_are_spread_evenly_over_seeds_and_over_numbers(vary: str) -> None:
    counter, fixed = np.arange(100_000, dtype=np.uint64), np.full(100_000, 7, np.uint64)
    u = uniform(counter, fixed) if vary == "seed" else uniform(fixed, counter)
    assert u.min() >= 0
    assert u.max() < 1
    observed = np.histogram(u, bins=100, range=(0, 1))[0]
    chi_square = ((observed - 1000) ** 2 / 1000).sum()
    assert chi_square < 99 + 6 * math.sqrt(2 * 99)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02
