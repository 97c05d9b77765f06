"""The GPU's kernels in the shapes of a Llama of 8 billion parameters, as fractions of what the device can do.

Pages lie in random order, and inputs are larger than the caches.
"""

import math

import torch

from bench.gpu_limits import Limits, median_ms
from bench.report import Claim
from kernels.gpu.paged_attention import paged_attention
from kernels.gpu.paged_kv import PagedKv
from kernels.gpu.prefill_attention import prefill_attention
from kernels.gpu.quantized_linear import GROUP, QuantizedWeight, quantized_linear
from kernels.gpu.shared_prefix_attention import Prefixes, shared_prefix_attention

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16
SCALE = HEAD_DIM**-0.5
HIDDEN, MLP = 4096, 14_336
BATCH, CONTEXT, LONG_CONTEXT = 32, 8192, 32_768
PREFIX, PRIVATE, PROMPT = 2048, 128, 8192


def measure(limits: Limits) -> list[Claim]:
    print_prefill(limits)
    print_products(limits)
    return [measure_decode(limits), measure_int8_kv(), measure_shared_prefix()]


def _kv(num_requests: int, num_tokens: int, dtype: torch.dtype) -> PagedKv:
    num_pages = num_requests * num_tokens // BLOCK
    shape = (num_pages, 2, NUM_KV_HEADS, BLOCK)
    pages = torch.empty(*shape, HEAD_DIM, dtype=dtype, device="cuda")
    if dtype == torch.int8:
        pages.random_(-127, 128)
        scales = torch.full(shape, 1 / 64, device="cuda")
    else:
        pages.normal_()
        scales = None
    table = torch.randperm(num_pages, device="cuda").int().view(num_requests, -1)
    return PagedKv(pages_P2GBC=pages, scales_P2GB=scales, table_RL=table)


def _decode_ms(num_requests: int, num_tokens: int, dtype: torch.dtype) -> float:
    kv = _kv(num_requests, num_tokens, dtype)
    q_THC = torch.randn(num_requests, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    rows = torch.arange(num_requests, device="cuda")
    lengths = torch.full_like(rows, num_tokens)
    return median_ms(
        lambda: paged_attention(q_THC, kv, rows_T=rows, lengths_T=lengths, window=None, scale=SCALE)
    )


def measure_decode(limits: Limits) -> Claim:
    num_bytes = BATCH * CONTEXT * 2 * NUM_KV_HEADS * HEAD_DIM * 2
    rate = num_bytes / _decode_ms(BATCH, CONTEXT, torch.bfloat16) / 1e6
    print(f"decode attention, {BATCH} contexts of {CONTEXT}: {rate:.0f} GB/s")
    value = rate / limits.copy_gb_s
    return Claim(name="decode_attention_of_copy", value=value, unit="", aim=0.85, better="higher")


def measure_int8_kv() -> Claim:
    whole, int8 = (_decode_ms(BATCH // 2, LONG_CONTEXT, dtype) for dtype in (torch.bfloat16, torch.int8))
    print(f"decode attention, {BATCH // 2} contexts of {LONG_CONTEXT}: {whole:.3f} ms, int8 {int8:.3f} ms")
    return Claim(name="int8kv_vs_bf16", value=whole / int8, unit="x", aim=1.5, better="higher")


def measure_shared_prefix() -> Claim:
    plain = _decode_ms(BATCH, PREFIX + PRIVATE, torch.bfloat16)
    shared, own = _kv(1, PREFIX, torch.bfloat16), _kv(BATCH, PRIVATE, torch.bfloat16)
    starts = torch.tensor([0, BATCH], device="cuda")
    prefixes = Prefixes(kv=shared, prefix_lengths_N=torch.tensor([PREFIX], device="cuda"), starts=starts)
    q_THC = torch.randn(BATCH, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    rows = torch.arange(BATCH, device="cuda")
    lengths = torch.full_like(rows, PRIVATE)
    relay = median_ms(
        lambda: shared_prefix_attention(q_THC, prefixes, own, rows_T=rows, lengths_T=lengths, scale=SCALE)
    )
    print(f"{BATCH} tokens after {PREFIX} shared and {PRIVATE} own: plain {plain:.3f} ms, shared {relay:.3f}")
    return Claim(name="relay_vs_plain", value=plain / relay, unit="x", aim=1.5, better="higher")


def print_prefill(limits: Limits) -> None:
    kv = _kv(1, PROMPT, torch.bfloat16)
    q_THC = torch.randn(PROMPT, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    starts, length = torch.tensor([0, PROMPT], device="cuda"), torch.tensor([PROMPT], device="cuda")
    ours = median_ms(
        lambda: prefill_attention(q_THC, kv, starts=starts, lengths_R=length, window=None, scale=SCALE)
    )
    heads_HTC = q_THC.transpose(0, 1).unsqueeze(0)
    theirs = median_ms(
        lambda: torch.nn.functional.scaled_dot_product_attention(
            heads_HTC,
            heads_HTC[:, :NUM_KV_HEADS],
            heads_HTC[:, :NUM_KV_HEADS],
            is_causal=True,
            enable_gqa=True,
        )
    )
    rate = 2 * PROMPT * PROMPT * NUM_HEADS * HEAD_DIM / ours / 1e9
    share = rate / limits.matrix_tflop_s
    print(
        f"attention of a prompt of {PROMPT}: {rate:.0f} TFLOP/s ({share:.0%} of the rate), torch {theirs:.3f} ms"
    )
    print(f"                                  {ours:.3f} ms")


def print_products(limits: Limits) -> None:
    """Of layers with quantised weights: for one token what is read, for many what is computed."""
    for kind, dtype, bits in (("int8", torch.int8, 8), ("int4", torch.uint8, 4)):
        numbers = torch.empty(MLP, HIDDEN * bits // 8, dtype=dtype, device="cuda").random_(0, 100)
        table = torch.ones(MLP, math.ceil(HIDDEN / GROUP), device="cuda")
        weight = QuantizedWeight(
            numbers_NK=numbers, scales_NJ=table, zeros_NJ=table if kind == "int4" else None
        )
        for num_tokens in (1, 64, 2048):
            x = torch.randn(num_tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
            ms = median_ms(lambda x=x, weight=weight: quantized_linear(x, weight))  # type: ignore[misc]
            read, done = MLP * HIDDEN * bits / 8 / ms / 1e6, 2 * num_tokens * MLP * HIDDEN / ms / 1e9
            print(
                f"{kind} linear, {num_tokens} tokens: {ms:.4f} ms, {read / limits.copy_gb_s:.0%} of the bandwidth,"
                f" {done / limits.matrix_tflop_s:.0%} of the matrix rate"
            )
