"""Mixtures of experts: routing, and both ways to compute them, against the plain loop over experts."""

import pytest
import torch

from kernels import int8_linear, route_experts, silu_mul
from kernels.expert_mlp import expert_mlp, expert_mlp_calls, reference
from kernels.int8_linear import Int8Weights
from kernels.panels import Panels
from kernels.team import Program, Step

HIDDEN, WIDTH = 40, 24


def make_experts(num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    gate_up = torch.randn(num_experts, 2 * WIDTH, HIDDEN, generator=generator)
    return gate_up, torch.randn(num_experts, HIDDEN, WIDTH, generator=generator)


def packed(w_ENK: torch.Tensor, kind: type[Panels] | type[Int8Weights]) -> Panels | Int8Weights:
    weights = kind(*w_ENK.shape[1:], num_experts=len(w_ENK))
    for expert, w_NK in enumerate(w_ENK):
        weights.put(w_NK, expert=expert)
    return weights


@pytest.mark.parametrize(("num_experts", "num_active"), [(1, 1), (4, 2), (8, 8), (60, 4)])
@pytest.mark.parametrize("num_tokens", [1, 7, 30])
@pytest.mark.parametrize("normalizes", [False, True])
def test_the_compiled_tasks_agree_with_the_reference(
    num_experts: int, num_active: int, num_tokens: int, normalizes: bool
) -> None:
    gate_up, down = make_experts(num_experts)
    x, logits = torch.randn(num_tokens, HIDDEN), torch.randn(num_tokens, num_experts)
    weights, experts = route_experts.reference(logits, num_active=num_active, normalizes=normalizes)
    expected = reference(x, gate_up, down, weights_TK=weights, experts_TK=experts)

    step = Step()
    step.fill(num_tokens)
    got_weights, got = torch.empty_like(weights), torch.empty_like(x)
    got_experts, places = torch.empty_like(experts), torch.empty_like(experts)
    starts = torch.empty(num_experts + 1, dtype=torch.int64)
    route = route_experts.route_experts_call(
        step, logits.clone(), normalizes=normalizes, weights_TK=got_weights, experts_TK=got_experts,
        places_TK=places, starts=starts,
    )  # fmt: skip
    calls = expert_mlp_calls(
        step,
        x,
        packed(gate_up, Panels),
        packed(down, Panels),
        weights_TK=got_weights,
        places_TK=places,
        starts=starts,
        out_TD=got,
    )
    Program([route, *calls]).run()
    torch.testing.assert_close(got_weights, weights)
    assert torch.equal(got_experts, experts)
    assert torch.equal(starts.diff(), torch.bincount(experts.flatten(), minlength=num_experts))
    assert sorted(places.flatten().tolist()) == list(range(num_tokens * num_active))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("num_experts", "num_active"), [(1, 1), (4, 2), (60, 4)])
def test_many_tokens_agree_with_the_reference(num_experts: int, num_active: int) -> None:
    gate_up, down = make_experts(num_experts)
    x = torch.randn(90, HIDDEN)
    weights, experts = route_experts.route_experts(
        torch.randn(90, num_experts), num_active=num_active, normalizes=True
    )
    choice = {"weights_TK": weights, "experts_TK": experts}
    torch.testing.assert_close(
        expert_mlp(x, packed(gate_up, Panels), packed(down, Panels), **choice),
        reference(x, gate_up, down, **choice),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    ("num_experts", "num_active", "num_tokens"), [(1, 1, 5), (4, 2, 1), (4, 2, 130), (60, 4, 9)]
)
def test_int8_experts_agree_with_int8_products_of_each(
    num_experts: int, num_active: int, num_tokens: int
) -> None:
    gate_up, down = make_experts(num_experts)
    x = torch.randn(num_tokens, HIDDEN)
    weights, experts = route_experts.route_experts(
        torch.randn(num_tokens, num_experts), num_active=num_active, normalizes=True
    )
    expected = torch.zeros_like(x)
    for t in range(num_tokens):
        for k in range(num_active):
            expert = experts[t, k]
            act = silu_mul.silu_mul(int8_linear.reference(x[t : t + 1], gate_up[expert]))
            expected[t] += weights[t, k] * int8_linear.reference(act, down[expert])[0]
    got = expert_mlp(
        x, packed(gate_up, Int8Weights), packed(down, Int8Weights), weights_TK=weights, experts_TK=experts
    )
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)
