"""Rotation, norms and pages in one pass against the formulas, for every kind of pages; what is not named stays."""

import torch
from hopper import Shipped
from inputs import (
    BLOCK,
    DEVICE,
    TOLERANCE,
    assert_close,
    assert_guards_untouched,
    assert_steps_close,
    guarded_pool,
    randn,
    shape_only,
)

from kernels.gpu.paged_kv import SCALED
from kernels.gpu.rotate_and_store import Rotation, reference_, rotate_and_store_

NUM_PAGES = 4


def _rotation(head_dim: int, *, has_norms: bool, dtype: torch.dtype) -> Rotation:
    angle_XF = torch.arange(100, device=DEVICE).unsqueeze(1) * randn(head_dim // 2).abs()
    norms = [randn(head_dim, dtype=dtype, seed=seed) if has_norms else None for seed in (1, 2)]
    return Rotation(
        cos_XF=angle_XF.cos(), sin_XF=angle_XF.sin(), q_norm_C=norms[0], k_norm_C=norms[1], eps=1e-6
    )


def _pools(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape = (NUM_PAGES, 2, num_kv_heads, BLOCK)
    scales = guarded_pool(*shape, dtype=torch.float32) if dtype in SCALED else None
    return guarded_pool(*shape, head_dim, dtype=dtype), scales


def _assert_agrees(
    heads: tuple[int, int], head_dim: int, *, has_norms: bool, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    slots, positions = torch.tensor([5, 63, 16], device=DEVICE), torch.tensor([0, 99, 7], device=DEVICE)
    rotation = _rotation(head_dim, has_norms=has_norms, dtype=dtype)
    qkv = randn(3, (heads[0] + 2 * heads[1]) * head_dim, dtype=dtype)
    pages, scales = _pools(heads[1], head_dim, kv_dtype)
    expected_qkv = qkv.clone()
    expected_pages, expected_scales = _pools(heads[1], head_dim, kv_dtype)
    step = {"positions_T": positions, "slots_T": slots}
    rotate_and_store_(qkv, pages, scales, rotation, **step)
    reference_(expected_qkv, expected_pages, expected_scales, rotation, **step)
    assert_close(qkv, expected_qkv, tolerance=TOLERANCE[dtype])
    got, expected = pages.float(), expected_pages.float()
    if scales is not None:
        torch.testing.assert_close(scales, expected_scales, equal_nan=True, atol=1e-2, rtol=1e-2)
        got, expected = got * scales.unsqueeze(-1), expected * expected_scales.unsqueeze(-1)
        assert_guards_untouched(scales)
    assert_steps_close(got, expected, dtype=kv_dtype)
    assert_guards_untouched(pages)


def check_agrees_with_the_reference_for_every_shape() -> None:
    for heads, head_dim in [((1, 1), 16), ((6, 2), 24), ((9, 3), 128)]:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for has_norms in (False, True):
                _assert_agrees(heads, head_dim, has_norms=has_norms, dtype=dtype, kv_dtype=dtype)


def check_pages_of_int8_and_fp8_get_scaled_numbers() -> None:
    for kv_dtype in SCALED:
        for heads, has_norms in [((4, 2), False), ((3, 1), True)]:
            _assert_agrees(heads, 32, has_norms=has_norms, dtype=torch.float32, kv_dtype=kv_dtype)


def check_a_head_of_zeros_has_scale_zero_and_comes_back_as_zeros() -> None:
    for kv_dtype in SCALED:
        pages, scales = _pools(1, 16, kv_dtype)
        slot = torch.tensor([3], device=DEVICE)
        rotation = _rotation(16, has_norms=False, dtype=torch.float32)
        rotate_and_store_(
            torch.zeros(1, 48, device=DEVICE), pages, scales, rotation, positions_T=slot, slots_T=slot
        )
        assert not pages[0, :, :, 3].float().any()
        assert not scales[0, :, :, 3].any()


def check_no_tokens_are_no_launch() -> None:
    pages, _ = _pools(1, 16, torch.float32)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    rotation = _rotation(16, has_norms=False, dtype=torch.float32)
    rotate_and_store_(randn(0, 48), pages, None, rotation, positions_T=nothing, slots_T=nothing)
    assert pages.isnan().all()


def _launch(*, kv_dtype: torch.dtype, has_norms: bool) -> None:
    shape, ids = (1024, 2, 8, BLOCK), shape_only(64, dtype=torch.int64)
    table, norm = shape_only(8192, 64, dtype=torch.float32), shape_only(128, dtype=torch.bfloat16)
    norm = norm if has_norms else None
    rotate_and_store_(
        shape_only(64, 48 * 128, dtype=torch.bfloat16),
        shape_only(*shape, 128, dtype=kv_dtype),
        shape_only(*shape, dtype=torch.float32) if kv_dtype in SCALED else None,
        Rotation(cos_XF=table, sin_XF=table, q_norm_C=norm, k_norm_C=norm, eps=1e-6),
        positions_T=ids,
        slots_T=ids,
    )


SHIPPED = [
    Shipped(
        name=f"{name}{'_norms' * has_norms}",
        units=(None,),
        launch=lambda dtype=dtype, has_norms=has_norms: _launch(kv_dtype=dtype, has_norms=has_norms),
    )
    for name, dtype in {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}.items()
    for has_norms in (False, True)
]
