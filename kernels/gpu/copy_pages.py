"""Blocks between pages and staging: staging[n, l] = pages[l, ids[n]], and back.

L layers, P pages, N blocks, W words of 8 bytes of a page. A block in staging is all its layers one after the other, as
it lies on the wire and in the tiers below, so that one copy to pinned memory moves as many blocks as there are. A layer
there may be wider than a page: its other words are those of other pages, such as the scales of these.
"""

import torch
import triton
import triton.language as tl

_WORDS, _WARPS = 1024, 4


def reference_gather(pages_LPW: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    return pages_LPW[:, ids_N].transpose(0, 1).contiguous()


def reference_scatter_(pages_LPW: torch.Tensor, ids_N: torch.Tensor, staging_NLW: torch.Tensor) -> None:
    pages_LPW[:, ids_N] = staging_NLW.transpose(0, 1)


@triton.jit(do_not_specialize=["num_layers"])
def _kernel(
    pages, stride_layer, ids, staging, stride_staged, num_layers,
    W: tl.constexpr, WORDS: tl.constexpr, GATHERS: tl.constexpr,
):  # fmt: skip
    block, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    word_W = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    page = tl.load(ids + block).to(tl.int64)
    page_W = pages + layer * stride_layer + page * W + word_W
    staging_W = staging + (block * num_layers + layer) * stride_staged + word_W
    if GATHERS:
        tl.store(staging_W, tl.load(page_W, mask=word_W < W), mask=word_W < W)
    else:
        tl.store(page_W, tl.load(staging_W, mask=word_W < W), mask=word_W < W)


def gather_(pages_LPW: torch.Tensor, ids_N: torch.Tensor, staging_NLW: torch.Tensor) -> None:
    """Fills staging with the blocks of `ids_N` in order."""
    _launch(pages_LPW, ids_N, staging_NLW, gathers=True)


def scatter_(pages_LPW: torch.Tensor, ids_N: torch.Tensor, staging_NLW: torch.Tensor) -> None:
    """Fills the pages of `ids_N`, which all differ, with the blocks in staging."""
    _launch(pages_LPW, ids_N, staging_NLW, gathers=False)


def _launch(
    pages_LPW: torch.Tensor, ids_N: torch.Tensor, staging_NLW: torch.Tensor, *, gathers: bool
) -> None:
    num_layers, _, num_words = pages_LPW.shape
    if pages_LPW.dtype != torch.int64 or staging_NLW.dtype != torch.int64:
        raise ValueError(f"pages and staging are words of int64, got {pages_LPW.dtype}, {staging_NLW.dtype}")
    if pages_LPW.stride()[1:] != (num_words, 1):
        raise ValueError(f"the pages of a layer must be contiguous, got strides {pages_LPW.stride()}")
    stride_staged = staging_NLW.stride(1)
    if staging_NLW.stride() != (num_layers * stride_staged, stride_staged, 1):
        raise ValueError(f"staging must be layer after layer, got strides {staging_NLW.stride()}")
    if staging_NLW.shape != (len(ids_N), num_layers, num_words):
        wanted = [len(ids_N), num_layers, num_words]
        raise ValueError(f"staging must be {wanted}, got {list(staging_NLW.shape)}")
    if len(ids_N):
        _kernel[(len(ids_N), num_layers, triton.cdiv(num_words, _WORDS))](
            pages_LPW, pages_LPW.stride(0), ids_N, staging_NLW, stride_staged, num_layers,
            W=num_words, WORDS=_WORDS, GATHERS=gathers, num_warps=_WARPS,
        )  # fmt: skip
