"""Keys and values in pages, as attention reads them: whole values, or int8 and fp8 with one scale a token and head.

P pages, G key/value heads, B tokens per page, C head dimension, R requests, L longest page list, S tokens of a context.
pages_P2GBC holds keys at index 0 and values at index 1. A stored number x stands for x * scales_P2GB. A scale a token
leaves the products of matrices alone: q.k scales a column of the scores, and that of v the weight of its token.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

WHOLE = (torch.bfloat16, torch.float16, torch.float32)
SCALED = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedKv:
    pages_P2GBC: torch.Tensor
    scales_P2GB: torch.Tensor | None  # float32, for int8 and fp8
    table_RL: torch.Tensor  # int32 page ids of each request, in order

    def __post_init__(self) -> None:
        dtype, shape = self.pages_P2GBC.dtype, self.pages_P2GBC.shape
        if dtype not in WHOLE + SCALED:
            raise ValueError(f"pages must be of {WHOLE + SCALED}, got {dtype}")
        if len(shape) != 5 or not self.pages_P2GBC.is_contiguous():
            raise ValueError(f"pages must be contiguous [P, 2, G, B, C], got {list(shape)}")
        got = None if self.scales_P2GB is None else self.scales_P2GB.shape
        wanted = shape[:4] if dtype in SCALED else None
        if got != wanted:
            raise ValueError(f"pages of {dtype} need scales of shape {wanted}, got {got}")
        if self.table_RL.dtype != torch.int32 or self.table_RL.stride(-1) != 1:
            raise ValueError(f"page ids must be int32, each row contiguous, got {self.table_RL.dtype}")

    @property
    def num_kv_heads(self) -> int:
        return self.pages_P2GBC.shape[2]

    @property
    def block(self) -> int:
        return self.pages_P2GBC.shape[3]

    @property
    def head_dim(self) -> int:
        return self.pages_P2GBC.shape[4]

    @property
    def max_tokens(self) -> int:
        """That a row of the table has room for."""
        return self.table_RL.shape[1] * self.block

    def context(self, row: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of a request's first tokens, each [G, S, C] in float32; for references."""
        ids = self.table_RL[row, : -(-length // self.block)].long()
        if self.scales_P2GB is None:
            kv_L2GBC = self.pages_P2GBC[ids].float()
        else:  # as bytes: not every torch can read fp8 by index
            numbers_L2GBC = self.pages_P2GBC.view(torch.uint8)[ids].view(self.pages_P2GBC.dtype)
            kv_L2GBC = numbers_L2GBC.float() * self.scales_P2GB[ids].unsqueeze(-1)
        shape = (2, self.num_kv_heads, len(ids) * self.block, self.head_dim)
        k_GSC, v_GSC = kv_L2GBC.permute(1, 2, 0, 3, 4).reshape(shape)[:, :, :length]
        return k_GSC, v_GSC


def padded_width(head_dim: int) -> int:
    """CP: a power of two, and no less than the tensor cores multiply."""
    return max(16, triton.next_power_of_2(head_dim))


@triton.jit
def load_tile(
    pages, page_S, place_S, head, exists_S,
    HEADS: tl.constexpr, B: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[S, CP] of head `head` out of HEADS = 2G (keys, then values); zeros where nothing exists, and beyond C."""
    c = tl.arange(0, CP)
    place = pages + (page_S * (HEADS * B * C) + head * (B * C) + place_S * C)[:, None] + c[None, :]
    if MASKED and CP != C:
        x_SC = tl.load(place, mask=exists_S[:, None] & (c < C)[None, :], other=0.0)
    elif MASKED:
        x_SC = tl.load(place, mask=exists_S[:, None], other=0.0)
    elif CP != C:
        x_SC = tl.load(place, mask=(c < C)[None, :], other=0.0)
    else:
        x_SC = tl.load(place)
    return x_SC


@triton.jit
def load_scales(
    scales, page_S, place_S, head, exists_S, HEADS: tl.constexpr, B: tl.constexpr, MASKED: tl.constexpr
):
    place = scales + page_S * (HEADS * B) + head * B + place_S
    return tl.load(place, mask=exists_S, other=0.0) if MASKED else tl.load(place)
