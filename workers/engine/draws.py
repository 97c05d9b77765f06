"""How a step's tokens are drawn, as tensors, without numpy: a bare GPU machine has none.

The random numbers are those of `kernels.sample.uniform`, so that a seed gives the same tokens on every device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.request import SamplingParams

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDraws:
    """One entry per row; the fields of `kernels.gpu.sample.Draws`. Temperature 0 is greedy and uses nothing else."""

    temperature: torch.Tensor  # float32
    top_k: torch.Tensor  # int64, 0 keeps all
    top_p: torch.Tensor  # float64
    min_p: torch.Tensor  # float64
    uniform: torch.Tensor  # float64


def uniform(seed: int, token_number: int) -> float:
    """A number in [0, 1) of 53 random bits: SplitMix64's output `token_number`."""
    state = _mix((seed + _GAMMA) & _MASK)
    return (_mix((state + (token_number + 1) * _GAMMA) & _MASK) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def draws_of(rows: Sequence[tuple[SamplingParams, int]]) -> StepDraws:
    """Of rows with the number of the token that each draws."""
    samplings = [sampling for sampling, _ in rows]
    drawn = [uniform(sampling.seed, number) if sampling.temperature > 0 else 0.0 for sampling, number in rows]
    return StepDraws(
        temperature=torch.tensor([sampling.temperature for sampling in samplings], dtype=torch.float32),
        top_k=torch.tensor([sampling.top_k for sampling in samplings], dtype=torch.int64),
        top_p=torch.tensor([sampling.top_p for sampling in samplings], dtype=torch.float64),
        min_p=torch.tensor([sampling.min_p for sampling in samplings], dtype=torch.float64),
        uniform=torch.tensor(drawn, dtype=torch.float64),
    )
