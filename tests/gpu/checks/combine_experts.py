"""Weighted sums of experts' rows against the formula."""

import torch
from hopper import Shipped
from inputs import DEVICE, TOLERANCE, assert_close, randn, shape_only

from kernels.gpu.combine_experts import combine_experts, reference


def check_agrees_with_the_reference() -> None:
    for num_tokens, num_active, width in [(1, 1, 1), (5, 2, 100), (3, 8, 1025), (0, 2, 16)]:
        num_rows = num_tokens * num_active
        places = torch.randperm(num_rows, generator=torch.Generator().manual_seed(5)).to(DEVICE)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            where = {
                "places_TK": places.view(num_tokens, num_active),
                "weights_TK": randn(num_tokens, num_active, seed=1),
            }
            rows = randn(num_rows, width, dtype=dtype)
            got = combine_experts(rows, **where)
            assert got.dtype == dtype
            assert_close(got, reference(rows, **where), tolerance=TOLERANCE[dtype])


SHIPPED = [
    Shipped(
        name="top_8",
        units=(None,),
        launch=lambda: combine_experts(
            shape_only(512, 4096, dtype=torch.bfloat16),
            places_TK=shape_only(64, 8, dtype=torch.int64),
            weights_TK=shape_only(64, 8, dtype=torch.float32),
        ),
    )
]
