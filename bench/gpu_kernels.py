"""The GPU's kernels in the shapes of a Llama of 8 billion parameters, as fractions of what the device can do.

Pages lie in random order, and inputs are larger than the caches.
"""

from collections.abc import Callable

import torch

from bench.gpu_limits import Limits, median_ms
from bench.report import Claim
from kernels.gpu.grouped_matmul import grouped_matmul
from kernels.gpu.grouped_quantized_matmul import grouped_quantized_matmul
from kernels.gpu.paged_attention import paged_attention
from kernels.gpu.paged_kv import PagedKv
from kernels.gpu.prefill_attention import prefill_attention
from kernels.gpu.quantized_linear import quantized_linear
from kernels.gpu.quantized_weight import GROUP, QuantizedWeight
from kernels.gpu.shared_prefix_attention import Prefixes, shared_prefix_attention

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16
SCALE = HEAD_DIM**-0.5
HIDDEN, MLP = 4096, 14_336
BATCH, CONTEXT, LONG_CONTEXT = 32, 8192, 32_768
PREFIX, PRIVATE, PROMPT = 2048, 128, 8192
# Of a Qwen3-MoE of 30 billion parameters.
NUM_EXPERTS, NUM_ACTIVE, EXPERT_HIDDEN, EXPERT_OUTPUTS = 128, 8, 2048, 1536
QUANTIZED = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
NUM_BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5, "fp8": 1.0}

Run = Callable[[], object]


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


def _queries(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")


def decode(num_requests: int, num_tokens: int, dtype: torch.dtype) -> Run:
    kv, q_THC = _kv(num_requests, num_tokens, dtype), _queries(num_requests)
    rows = torch.arange(num_requests, device="cuda")
    lengths = torch.full_like(rows, num_tokens)
    return lambda: paged_attention(q_THC, kv, rows_T=rows, lengths_T=lengths, window=None, scale=SCALE)


def prefill(num_tokens: int, dtype: torch.dtype) -> Run:
    kv, q_THC = _kv(1, num_tokens, dtype), _queries(num_tokens)
    starts, length = (torch.tensor(values, device="cuda") for values in ([0, num_tokens], [num_tokens]))
    return lambda: prefill_attention(q_THC, kv, starts=starts, lengths_R=length, window=None, scale=SCALE)


def torch_prefill(num_tokens: int) -> Run:
    heads_HTC = _queries(num_tokens).transpose(0, 1).unsqueeze(0)
    k_GTC = heads_HTC[:, :NUM_KV_HEADS]
    attention = torch.nn.functional.scaled_dot_product_attention
    return lambda: attention(heads_HTC, k_GTC, k_GTC, is_causal=True, enable_gqa=True)


def shared_prefix(num_requests: int, num_shared: int, num_own: int, dtype: torch.dtype) -> Run:
    own, q_THC = _kv(num_requests, num_own, dtype), _queries(num_requests)
    prefixes = Prefixes(
        kv=_kv(1, num_shared, dtype),
        prefix_lengths_N=torch.tensor([num_shared], device="cuda"),
        starts=torch.tensor([0, num_requests], device="cuda"),
    )
    rows = torch.arange(num_requests, device="cuda")
    lengths = torch.full_like(rows, num_own)
    return lambda: shared_prefix_attention(q_THC, prefixes, own, rows_T=rows, lengths_T=lengths, scale=SCALE)


def quantized(num_outputs: int, num_inputs: int, kind: str) -> QuantizedWeight:
    is_packed = kind == "int4"
    numbers = torch.empty(
        num_outputs, num_inputs // (2 if is_packed else 1), dtype=torch.uint8, device="cuda"
    ).random_(0, 100)
    table = torch.ones(num_outputs, num_inputs // GROUP, device="cuda")
    return QuantizedWeight(
        numbers_NK=numbers.view(QUANTIZED[kind]), scales_NJ=table, zeros_NJ=table if is_packed else None
    )


def linear(num_tokens: int, kind: str) -> Run:
    weight = quantized(MLP, HIDDEN, kind)
    x_TK = torch.randn(num_tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
    return lambda: quantized_linear(x_TK, weight)


def experts(num_tokens: int, kind: str) -> Run:
    """The first product of a layer of experts, each of which has its share of the tokens."""
    x_TK = torch.randn(num_tokens, EXPERT_HIDDEN, dtype=torch.bfloat16, device="cuda")
    num_rows = num_tokens * NUM_ACTIVE
    sources_S = torch.arange(num_rows, device="cuda") % num_tokens
    starts = torch.arange(NUM_EXPERTS + 1, device="cuda") * num_rows // NUM_EXPERTS
    if kind == "bf16":
        weight_ENK = torch.randn(
            NUM_EXPERTS, EXPERT_OUTPUTS, EXPERT_HIDDEN, dtype=torch.bfloat16, device="cuda"
        )
        return lambda: grouped_matmul(x_TK, weight_ENK, sources_S=sources_S, starts=starts)
    weight = quantized(NUM_EXPERTS * EXPERT_OUTPUTS, EXPERT_HIDDEN, kind)
    return lambda: grouped_quantized_matmul(x_TK, weight, sources_S=sources_S, starts=starts)


def measure_decode(limits: Limits) -> Claim:
    num_bytes = BATCH * CONTEXT * 2 * NUM_KV_HEADS * HEAD_DIM * 2
    rate = num_bytes / median_ms(decode(BATCH, CONTEXT, torch.bfloat16)) / 1e6
    print(f"decode attention, {BATCH} contexts of {CONTEXT}: {rate:.0f} GB/s")
    value = rate / limits.copy_gb_s
    return Claim(name="decode_attention_of_copy", value=value, unit="", aim=0.85, better="higher")


def measure_int8_kv() -> Claim:
    whole, int8 = (
        median_ms(decode(BATCH // 2, LONG_CONTEXT, dtype)) for dtype in (torch.bfloat16, torch.int8)
    )
    print(f"decode attention, {BATCH // 2} contexts of {LONG_CONTEXT}: {whole:.3f} ms, int8 {int8:.3f} ms")
    return Claim(name="int8kv_vs_bf16", value=whole / int8, unit="x", aim=1.5, better="higher")


def measure_shared_prefix() -> Claim:
    plain = median_ms(decode(BATCH, PREFIX + PRIVATE, torch.bfloat16))
    relay = median_ms(shared_prefix(BATCH, PREFIX, PRIVATE, torch.bfloat16))
    print(f"{BATCH} tokens after {PREFIX} shared and {PRIVATE} own: plain {plain:.3f} ms, shared {relay:.3f}")
    return Claim(name="relay_vs_plain", value=plain / relay, unit="x", aim=1.5, better="higher")


def print_prefill(limits: Limits) -> None:
    ours, theirs = median_ms(prefill(PROMPT, torch.bfloat16)), median_ms(torch_prefill(PROMPT))
    rate = 2 * PROMPT * PROMPT * NUM_HEADS * HEAD_DIM / ours / 1e9
    share = rate / limits.matrix_tflop_s
    print(
        f"attention of a prompt of {PROMPT}: {ours:.3f} ms, torch {theirs:.3f} ms; {share:.0%} of the matrix rate"
    )


def print_products(limits: Limits) -> None:
    """Of quantised weights, and of whole ones of experts: for few tokens what is read, for many what is computed."""
    for kind in QUANTIZED:
        for num_tokens in (1, 64, 2048):
            ms = median_ms(linear(num_tokens, kind))
            read = NUM_BYTES[kind] * MLP * HIDDEN / ms / 1e6 / limits.copy_gb_s
            done = 2 * num_tokens * MLP * HIDDEN / ms / 1e9 / limits.matrix_tflop_s
            print(f"{kind} linear, {num_tokens} tokens: {ms:.4f} ms, {_shares(read, done)}")
    for kind in NUM_BYTES:
        for num_tokens in (1, 64, 4096):
            ms = median_ms(experts(num_tokens, kind))
            num_read = min(NUM_EXPERTS, num_tokens * NUM_ACTIVE) * EXPERT_OUTPUTS * EXPERT_HIDDEN
            num_multiplied = num_tokens * NUM_ACTIVE * EXPERT_OUTPUTS * EXPERT_HIDDEN
            read = NUM_BYTES[kind] * num_read / ms / 1e6 / limits.copy_gb_s
            done = 2 * num_multiplied / ms / 1e9 / limits.matrix_tflop_s
            print(f"{kind} experts, {num_tokens} tokens: {ms:.4f} ms, {_shares(read, done)}")


def _shares(read: float, done: float) -> str:
    return f"{read:.0%} of the bandwidth, {done:.0%} of the bf16 matrix rate"
