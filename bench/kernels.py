"""Kernels against torch's own on one core: products of many rows, and attention of prompts.

    python -m bench.kernels [--quick]

What a row gives does not depend on the rows beside it in ours; that is the price of what is slower here, and what is
faster pays it. Sides alternate in one run; figures are medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from bench.report import Claim, write_report
from kernels.linear import linear
from kernels.paged_attention import paged_attention
from kernels.panels import Panels
from kernels.prefill_attention import prefill_attention

BLOCK = 16
NUM_INPUTS, NUM_OUTPUTS, NUM_ROWS = 1024, 5632, 512
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 16, 4, 64
NUM_TOKENS, LONG_PREFIX = 512, 3584


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    num_rounds = 3 if quick else 15
    claims = [
        measure_linear(num_rounds),
        measure_attention("attention_alone_vs_torch", 0, num_rounds),
        measure_attention("attention_after_3584_vs_torch", LONG_PREFIX, num_rounds),
    ]
    write_report("kernels", claims, keep=not quick)


def measure_linear(num_rounds: int) -> Claim:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_ROWS, NUM_INPUTS, generator=generator)
    w = torch.randn(NUM_OUTPUTS, NUM_INPUTS, generator=generator)
    panels = Panels.of(w)
    ours_s, theirs_s = alternate(
        lambda: linear(x, panels), lambda: torch.nn.functional.linear(x, w), num_rounds
    )
    gflop = 2 * NUM_ROWS * NUM_INPUTS * NUM_OUTPUTS / 1e9
    print(f"linear, {NUM_ROWS} rows: {gflop / ours_s:.0f} GFLOP/s, torch {gflop / theirs_s:.0f}")
    return Claim(name="linear_512_vs_torch", value=theirs_s / ours_s, unit="x", aim=1.0, better="higher")


def measure_attention(name: str, num_prefix: int, num_rounds: int) -> Claim:
    """Of a chunk of one prompt after `num_prefix` tokens."""
    generator = torch.Generator().manual_seed(0)
    num_all = num_prefix + NUM_TOKENS
    pages = torch.randn(num_all // BLOCK, 2, NUM_KV_HEADS, BLOCK, HEAD_DIM, generator=generator)
    q = torch.randn(NUM_TOKENS, NUM_HEADS, HEAD_DIM, generator=generator)
    k, v = pages[num_prefix // BLOCK :].permute(1, 0, 3, 2, 4).reshape(2, NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM)
    table, scale = torch.arange(len(pages), dtype=torch.int32), HEAD_DIM**-0.5
    ours_s, theirs_s = alternate(
        lambda: paged_attention(
            q, pages, table_RL=table[None], rows_T=torch.zeros(NUM_TOKENS, dtype=torch.int64),
            lengths_T=torch.arange(num_prefix, num_all) + 1, window=None, scale=scale,
        ),
        lambda: prefill_attention(
            q, k, v, pages, prefix_pages=table, num_prefix=num_prefix, window=None, scale=scale
        ),
        num_rounds,
    )  # fmt: skip
    print(
        f"attention, {NUM_TOKENS} tokens after {num_prefix}: {1e3 * ours_s:.1f} ms, torch {1e3 * theirs_s:.1f}"
    )
    return Claim(name=name, value=theirs_s / ours_s, unit="x", aim=1.0, better="higher")


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], num_rounds: int
) -> tuple[float, float]:
    """Medians, in seconds, after one round that is warm-up."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(num_rounds + 1)][1:]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def seconds(function: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    function()
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
