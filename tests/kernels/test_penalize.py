import pytest
import torch
import transformers

from kernels.penalize import penalize_, reference


def test_the_kernel_computes_what_the_formulas_say() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((5, 40), generator=generator) * 3
    entry = torch.randperm(5 * 40, generator=generator)[:60]
    row, token = entry // 40, entry % 40
    count = torch.randint(0, 4, (60,), generator=generator).float()
    penalties = torch.rand((5, 3), generator=generator) + 0.5
    expected = reference(logits, row, token, count_N=count, penalties_R3=penalties)
    penalize_(logits, row, token, count_N=count, penalties_R3=penalties)
    assert torch.allclose(logits, expected, rtol=1e-6, atol=1e-6)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn((1, 40), generator=torch.Generator().manual_seed(1))
    seen = torch.tensor([3, 7, 7, 30, 3])
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.3)(seen[None], logits.clone())
    distinct = seen.unique()
    penalize_(
        logits,
        torch.zeros_like(distinct),
        distinct,
        count_N=torch.zeros(len(distinct)),
        penalties_R3=torch.tensor([[1.3, 0.0, 0.0]]),
    )
    assert torch.equal(logits, expected)


def test_frequency_counts_and_presence_does_not() -> None:
    logits = torch.ones((1, 4))
    token = torch.tensor([0, 1, 2])
    penalize_(
        logits,
        torch.zeros_like(token),
        token,
        count_N=torch.tensor([0.0, 1.0, 3.0]),
        penalties_R3=torch.tensor([[1.0, 0.5, 0.25]]),
    )
    assert logits.tolist() == [[1.0, 0.25, -0.75, 1.0]]


def test_an_impossible_token_stays_impossible() -> None:
    logits = torch.tensor([[-torch.inf, 1.0]])
    token = torch.tensor([0])
    penalties = torch.tensor([[2.0, -2.0, -2.0]])
    penalize_(logits, token * 0, token, count_N=torch.ones(1), penalties_R3=penalties)
    assert logits.tolist() == [[-torch.inf, 1.0]]


def test_entries_of_different_lengths_are_refused() -> None:
    one, two = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="2 rows, 1 tokens, 1 counts"):
        penalize_(torch.zeros(1, 4), two, one, count_N=torch.zeros(1), penalties_R3=torch.ones(1, 3))
