"""Rotation as complex multiplication, and where keys and values end up."""

import pytest
import torch

from kernels.rotary import Rotation, reference, reference_rotate_and_store_, rotate_and_store_

NUM_HEADS, NUM_KV_HEADS, BLOCK = 6, 2, 16


def make_case(
    *, head_dim: int, norms: bool
) -> tuple[torch.Tensor, torch.Tensor, Rotation, dict[str, torch.Tensor]]:
    positions, slots = torch.tensor([0, 3, 49, 12, 13]), torch.tensor([5, 63, 17, 32, 33])
    angles = torch.outer(torch.arange(50.0), torch.rand(head_dim // 2))
    rotation = Rotation(
        cos_XF=angles.cos(), sin_XF=angles.sin(), q_norm_C=torch.rand(head_dim) if norms else None,
        k_norm_C=torch.rand(head_dim) if norms else None, eps=1e-6,
    )  # fmt: skip
    qkv = torch.randn(5, (NUM_HEADS + 2 * NUM_KV_HEADS) * head_dim)
    pages = torch.full((4, 2, NUM_KV_HEADS, BLOCK, head_dim), 9.0)
    return qkv, pages, rotation, {"positions_T": positions, "slots_T": slots}


@pytest.mark.parametrize("head_dim", [2, 8, 24, 64])
@pytest.mark.parametrize("norms", [False, True])
def test_agrees_with_the_reference(head_dim: int, norms: bool) -> None:
    qkv, pages, rotation, where = make_case(head_dim=head_dim, norms=norms)
    expected_qkv, expected_pages = qkv.clone(), pages.clone()
    reference_rotate_and_store_(expected_qkv, expected_pages, rotation, **where)
    rotate_and_store_(qkv, pages, rotation, **where)
    torch.testing.assert_close(qkv, expected_qkv)
    torch.testing.assert_close(pages, expected_pages)


def test_keys_and_values_go_to_their_slots_and_nowhere_else() -> None:
    qkv, pages, rotation, where = make_case(head_dim=8, norms=True)
    rotate_and_store_(qkv, pages, rotation, **where)
    heads = qkv.view(5, -1, 8)
    for token, slot in enumerate(where["slots_T"].tolist()):
        page, place = divmod(slot, BLOCK)
        assert torch.equal(pages[page, 0, :, place], heads[token, NUM_HEADS : NUM_HEADS + NUM_KV_HEADS])
        assert torch.equal(pages[page, 1, :, place], heads[token, NUM_HEADS + NUM_KV_HEADS :])
        pages[page, :, :, place] = 9.0
    assert (pages == 9.0).all()


def test_rotation_is_a_complex_product() -> None:
    x, positions = torch.randn(3, 2, 10), torch.tensor([4, 0, 7])
    angles = torch.outer(torch.arange(8.0), torch.rand(5))
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(
        torch.ones(3, 1, 5), angles[positions].unsqueeze(1)
    )
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(reference(x, positions, angles.cos(), angles.sin()), expected)
