"""Weights in panels: what was put can be read again, row by row."""

import pytest
import torch

from kernels.panels import Panels


@pytest.mark.parametrize(("num_outputs", "depth"), [(1, 1), (7, 40), (64, 33), (130, 100)])
def test_rows_come_back_as_they_were_put(num_outputs: int, depth: int) -> None:
    w_NK = torch.randn(num_outputs, depth)
    rows_T = torch.randint(num_outputs, (50,))
    assert torch.equal(Panels.of(w_NK)[rows_T], w_NK[rows_T])


def test_parts_that_fill_no_panels_make_the_whole() -> None:
    w_NK, panels = torch.randn(150, 33), Panels(150, 33)
    for start, stop in ((0, 5), (5, 70), (70, 71), (71, 150)):
        panels.put(w_NK[start:stop], start=start)
    assert torch.equal(panels.panels_EJKP, Panels.of(w_NK).panels_EJKP)


def test_experts_lie_one_after_the_other_with_zeros_behind_each() -> None:
    w_ENK, panels = torch.randn(3, 40, 12), Panels(40, 12, num_experts=3)
    for expert in (2, 0, 1):
        panels.put(w_ENK[expert], expert=expert)
    outputs_ENK = panels.panels_EJKP.transpose(2, 3).reshape(3, -1, 12)
    assert torch.equal(outputs_ENK[:, :40], w_ENK)
    assert not outputs_ENK[:, 40:].any()


@pytest.mark.parametrize(("start", "num_rows", "depth"), [(-1, 2, 8), (4, 2, 8), (0, 6, 8), (0, 2, 7)])
def test_rows_that_have_no_place_are_refused(start: int, num_rows: int, depth: int) -> None:
    with pytest.raises(ValueError, match=f"of {depth} inputs have no place in \\[5, 8\\]"):
        Panels(5, 8).put(torch.zeros(num_rows, depth), start=start)
