"""What is compiled for a processor without AVX-512, in a process of its own."""

import os
import subprocess
import sys

PRODUCTS = """
import torch
from kernels.linear import linear, reference
from kernels.panels import Panels
from kernels.vectors import LANES

assert LANES == 8, LANES
for num_inputs, num_outputs in ((7, 3), (64, 64), (100, 130), (600, 70)):
    x, w = torch.randn(67, num_inputs), torch.randn(num_outputs, num_inputs)
    panels = Panels.of(w)
    together = linear(x, panels)
    torch.testing.assert_close(together, reference(x, w), atol=1e-4, rtol=2e-5)
    for first, count in ((0, 1), (66, 1), (3, 2), (40, 3), (60, 5), (1, 64)):
        assert torch.equal(linear(x[first : first + count], panels), together[first : first + count])
"""

INT8_PRODUCTS = """
import torch
from kernels.int8_linear import Int8Weights, int8_linear, reference
from kernels.int8_tile import HAS_VNNI

assert not HAS_VNNI
for num_inputs, num_outputs in ((7, 3), (64, 64), (101, 130)):
    x, w = torch.randn(101, num_inputs), torch.randn(num_outputs, num_inputs)
    weights = Int8Weights(num_outputs, num_inputs)
    weights.put(w)
    for num_rows in (1, 2, 3, 4, 101):
        assert torch.equal(int8_linear(x[:num_rows], weights), reference(x[:num_rows], w))
"""

ATTENTION = """
import torch
from kernels.paged_attention import paged_attention, reference
from kernels.vectors import LANES

assert LANES == 8, LANES
for num_heads, num_kv_heads, width, window in ((6, 2, 24, None), (5, 1, 16, 20), (4, 4, 8, 7), (8, 1, 40, None)):
    pages = torch.randn(5, 2, num_kv_heads, 16, width)
    where = {"table_RL": torch.tensor([[3, 0, 4, 1, 2]], dtype=torch.int32)}
    q = torch.randn(70, num_heads, width)
    tokens = {"rows_T": torch.zeros(70, dtype=torch.int64), "lengths_T": torch.arange(1, 71)}
    together = paged_attention(q, pages, **where, **tokens, window=window, scale=0.2)
    expected = reference(q, pages, **where, **tokens, window=window, scale=0.2)
    torch.testing.assert_close(together, expected, atol=2e-6, rtol=2e-5)
    for first, count in ((0, 1), (69, 1), (10, 2), (33, 5), (50, 11)):
        part = slice(first, first + count)
        some = {name: values[part] for name, values in tokens.items()}
        alone = paged_attention(q[part], pages, **where, **some, window=window, scale=0.2)
        assert all(torch.equal(a, b[part]) for a, b in zip(alone, together, strict=True))
"""


def run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"NUMBA_CPU_NAME": "generic"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_products_agree_with_torch_and_do_not_depend_on_the_rows_beside_them() -> None:
    run(PRODUCTS)


def test_int8_products_are_those_of_any_other_processor_to_the_last_bit() -> None:
    run(INT8_PRODUCTS)


def test_attention_agrees_with_the_reference_and_does_not_depend_on_the_tokens_beside_it() -> None:
    run(ATTENTION)
