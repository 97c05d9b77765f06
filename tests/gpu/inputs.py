"""Inputs of the checks, on the device there is, and with poison wherever nothing may be read or written.

Poison is NaN, in whole numbers the extreme. Memory that torch hands out uninitialised is filled with it, so a result
that a kernel left out shows; pools of pages lie between guard pages of it, and so do the pages that no table names and
what lies behind the end of a context.
"""

import math
import os
import time

import torch

from kernels.gpu.paged_kv import SCALED, PagedKv

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or torch refuses products of matrices under the next line
torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what torch.empty gives

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = DEVICE == "cpu"
# A product of bfloat16 matrices is silently wrong in the interpreter.
FLOATS = (torch.float32, torch.float16) if IS_INTERPRETED else (torch.float16, torch.bfloat16)
# In the interpreter the same every time; on a GPU fresh, unless a failure is to be seen again.
SEED = int(os.environ.get("PENSTOCK_SEED", "0" if IS_INTERPRETED else str(time.time_ns() % 2**31)))
NUM_GUARDS = 2
BLOCK = 16
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED + seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def poison_(x: torch.Tensor) -> None:
    if x.dtype == torch.float8_e4m3fn:
        x.view(torch.uint8).fill_(0x7F)  # its NaN
    else:
        x.fill_(torch.nan if x.dtype.is_floating_point else torch.iinfo(x.dtype).min)


def assert_close(got: torch.Tensor, expected: torch.Tensor, *, tolerance: float) -> None:
    torch.testing.assert_close(got.float(), expected.float(), atol=tolerance, rtol=tolerance)


def assert_attends_as(
    expected: tuple[torch.Tensor, torch.Tensor], got: tuple[torch.Tensor, torch.Tensor], *, dtype: torch.dtype
) -> None:
    """(out, lse) of an attention with queries of this dtype."""
    assert got[0].dtype == dtype
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, tolerance=TOLERANCE[dtype])


def assert_equal_but_for_rounding(got: torch.Tensor, expected: torch.Tensor) -> None:
    """To the last bit; but the interpreter cuts a bfloat16 instead of rounding it."""
    if IS_INTERPRETED and got.dtype == torch.bfloat16:
        assert_close(got, expected, tolerance=2**-7)
    else:
        assert torch.equal(got, expected)


def assert_steps_close(got: torch.Tensor, expected: torch.Tensor, *, dtype: torch.dtype) -> None:
    """Of what was stored as `dtype`, in which a number at the edge between two steps may fall to either side.

    NaN is where it should be. A few in a hundred are halved by the interpreter: where rounding to fp8 carries into the
    exponent, it loses the carry.
    """
    assert torch.equal(got.isnan(), expected.isnan())
    got, expected = (x[~x.isnan()].float() for x in (got, expected))
    tolerance = {torch.int8: 0.05, torch.float8_e4m3fn: 0.15}.get(dtype) or TOLERANCE[dtype]
    wrong = (got - expected).abs() > tolerance * (1 + expected.abs())
    may_be_halved = IS_INTERPRETED and dtype == torch.float8_e4m3fn
    assert wrong.float().mean() <= (0.05 if may_be_halved else 0), (got[wrong], expected[wrong])


def guarded_pool(num_pages: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A pool of poison with guard pages before and behind it."""
    memory = torch.empty(num_pages + 2 * NUM_GUARDS, *shape, dtype=dtype, device=DEVICE)
    poison_(memory)
    return memory[NUM_GUARDS:-NUM_GUARDS]


def assert_guards_untouched(pool: torch.Tensor) -> None:
    num_pages, page_bytes = len(pool), math.prod(pool.shape[1:]) * pool.element_size()
    memory = torch.tensor([], dtype=torch.uint8, device=pool.device).set_(
        pool.untyped_storage(), 0, ((num_pages + 2 * NUM_GUARDS) * page_bytes,)
    )
    clean = torch.empty(page_bytes, dtype=torch.uint8, device=pool.device).view(pool.dtype)
    poison_(clean)
    for page in memory.view(-1, page_bytes)[[0, 1, -2, -1]]:
        assert torch.equal(page, clean.view(torch.uint8)), "a guard page was written to"


def make_kv(
    lengths: list[int], *, num_kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int = 1
) -> PagedKv:
    """Contexts of these lengths in pages of a shuffled order."""
    counts = [-(-length // BLOCK) for length in lengths]
    num_pages, shape = sum(counts) + 3, (2, num_kv_heads, BLOCK)
    pool = guarded_pool(num_pages, *shape, head_dim, dtype=dtype)
    scales = guarded_pool(num_pages, *shape, dtype=torch.float32) if dtype in SCALED else None
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).int().to(DEVICE)
    table = torch.full((len(lengths), max(counts) + 1), 2**30, dtype=torch.int32, device=DEVICE)
    values = randn(num_pages, *shape, head_dim, seed=seed)
    start = 0
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        table[row, :count] = order[start : start + count]
        start += count
        for index in range(count):
            page, end = int(table[row, index]), min(BLOCK, length - index * BLOCK)
            x = values[page, :, :, :end]
            if scales is not None:
                scales[page, :, :, :end] = x.abs().amax(-1) / (127 if dtype == torch.int8 else 448)
                x = x / scales[page, :, :, :end].unsqueeze(-1)
                x = x.round() if dtype == torch.int8 else x
            pool[page, :, :, :end] = x.to(dtype)
    return PagedKv(pages_P2GBC=pool, scales_P2GB=scales, table_RL=table)


def shape_only(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """For what is compiled and not run."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def kv_shape_only(*, num_rows: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> PagedKv:
    shape = (1024, 2, num_kv_heads, BLOCK)
    scales = shape_only(*shape, dtype=torch.float32) if dtype in SCALED else None
    return PagedKv(
        pages_P2GBC=shape_only(*shape, head_dim, dtype=dtype),
        scales_P2GB=scales,
        table_RL=shape_only(num_rows, 512, dtype=torch.int32),
    )
