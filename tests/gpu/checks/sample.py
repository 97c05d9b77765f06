"""Draws against the formulas that sort, for every filter and their mixtures; equals, ties of edges, damaged rows."""

from dataclasses import fields

import torch
from hopper import Shipped
from inputs import DEVICE, IS_INTERPRETED, randn, shape_only

from kernels.gpu.sample import Draws, reference, sample

VOCABULARIES = (1, 3, 100, 1500) if IS_INTERPRETED else (1, 3, 100, 1500, 32_000, 152_064)


def _draws(num_rows: int, **settings: list[float]) -> Draws:
    """`settings` are repeated until every row has one."""

    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        values = settings.get(name, [default])
        rows = [values[row % len(values)] for row in range(num_rows)]
        return torch.tensor(rows, dtype=dtype, device=DEVICE)

    uniform = torch.rand(num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    return Draws(
        temperature=column("temperature", 1.0, torch.float32),
        top_k=column("top_k", 0, torch.int64),
        top_p=column("top_p", 1.0, torch.float64),
        min_p=column("min_p", 0.0, torch.float64),
        uniform=torch.tensor(settings["uniform"], dtype=torch.float64, device=DEVICE)
        if "uniform" in settings
        else uniform.to(DEVICE),
    )


def _assert_agrees(logits: torch.Tensor, draws: Draws) -> None:
    got, expected = sample(logits, draws).cpu(), reference(logits.cpu(), draws)
    assert torch.equal(got, expected), (got, expected)


def check_greedy_takes_the_largest_and_of_equals_the_lowest_id() -> None:
    for vocab_size in VOCABULARIES:
        logits = randn(3, vocab_size)
        logits[0] = 0.0
        _assert_agrees(logits, _draws(3, temperature=[0.0]))


def check_agrees_with_the_reference_for_every_filter() -> None:
    for vocab_size in VOCABULARIES:
        logits = 3 * randn(6, vocab_size)
        _assert_agrees(logits, _draws(6, temperature=[1.0, 0.3]))
        _assert_agrees(logits, _draws(6, top_k=[1, 2, 50, 10_000]))
        _assert_agrees(logits, _draws(6, top_p=[0.0, 0.1, 0.5, 0.9, 0.999]))
        _assert_agrees(logits, _draws(6, min_p=[0.01, 0.3, 1.0]))


def check_agrees_with_the_reference_for_mixtures_of_filters() -> None:
    logits = 2 * randn(12, 1100)
    mixture = {"temperature": [0.7, 1.3, 0.0], "top_k": [0, 5, 40], "top_p": [0.8, 0.3], "min_p": [0.0, 0.05]}
    _assert_agrees(logits, _draws(12, **mixture))


def check_of_equals_at_the_edge_the_lowest_ids_are_kept() -> None:
    logits = (2 * randn(4, 1100)).round() / 2  # many equals
    logits[0] = 1.0
    logits[1, ::3] = -0.0
    _assert_agrees(logits, _draws(4, top_k=[3, 700, 20]))
    _assert_agrees(logits, _draws(4, top_p=[0.31, 0.77]))
    _assert_agrees(logits, _draws(4, top_k=[30, 9], top_p=[0.5, 0.9]))


def check_the_ends_of_the_uniform_numbers_give_the_first_and_the_last_kept() -> None:
    almost_one = 1 - 2.0**-53
    logits = torch.tensor([[1.0, 5.0, 4.0, 3.0, 0.0]] * 2, device=DEVICE)
    draws = _draws(2, top_k=[3], uniform=[0.0, almost_one])
    assert sample(logits, draws).tolist() == [1, 3]


def check_what_a_grammar_forbids_is_never_drawn() -> None:
    logits = randn(12, 50)
    logits[:, 7:] = -torch.inf
    assert (sample(logits, _draws(12, top_k=[0, 20], top_p=[1.0, 0.99])) < 7).all()


def check_damaged_rows_give_some_token_and_leave_the_others() -> None:
    logits = randn(4, 100)
    logits[0, 5], logits[1, 5], logits[2] = torch.nan, torch.inf, -torch.inf
    draws = _draws(4, top_k=[7])
    tokens = sample(logits, draws)
    assert ((tokens >= 0) & (tokens < 100)).all()
    assert tokens[1] == 5
    last = Draws(**{field.name: getattr(draws, field.name)[3:] for field in fields(draws)})
    assert tokens[3] == reference(logits[3:].cpu(), last)[0]


def check_rows_may_be_apart_and_no_rows_are_no_launch() -> None:
    logits = randn(3, 64)
    _assert_agrees(logits[:, :40], _draws(3, top_p=[0.7]))
    assert sample(logits[:0], _draws(0)).shape == (0,)


def _launch(dtype: torch.dtype) -> torch.Tensor:
    shapes = {
        "temperature": torch.float32,
        "top_k": torch.int64,
        "top_p": torch.float64,
        "min_p": torch.float64,
        "uniform": torch.float64,
    }
    draws = Draws(**{name: shape_only(64, dtype=column) for name, column in shapes.items()})
    return sample(shape_only(64, 152_064, dtype=dtype), draws)


SHIPPED = [
    Shipped(name=name, units=(None,), launch=lambda dtype=dtype: _launch(dtype))
    for name, dtype in {"fp32_logits": torch.float32, "bf16_logits": torch.bfloat16}.items()
]
