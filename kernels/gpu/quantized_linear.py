"""Linear layers whose weights have 8 or 4 bits: y = x W^T, W_nk = (q_nk - zero_nj) scale_nj for the k of group j.

int8 and fp8 (e4m3) have a scale for each group and no zero. int4 has a zero too, in steps; two numbers share a byte,
half a group apart, so that they need not be interleaved again: byte i of a group has number i in its low and number
i + GROUP/2 in its high half. A weight may have its inputs in an order of its own, in which groups are of inputs that
are alike; x is brought into it first.

T tokens, N outputs, K inputs, J = K / GROUP groups, I parts of K. What is multiplied are the whole numbers q - zero,
exact in bfloat16; the product of a group is scaled in float32. Weights are the first operand (y^T = W x^T), which
wgmma takes from registers, where they were unpacked: so a single token fills a tensor core's tile as well as many do.

For few tokens the layer is as fast as its weights are read, and a tile of outputs for each of 132 processors is too few
to keep memory busy: K is cut into parts, whose number depends on N and K alone, and their products are added up.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.gpu.tiling import Tiling

GROUP = 128  # of weights that we quantise
GROUPS = (128, 64, 32)  # of any: int4 is two halves of a group, and a tensor core takes 16 inputs at once
_FEW_TOKENS = 64
TILINGS = {  # by whether there are few tokens; the columns are tokens, and grow with them while they are few
    True: Tiling(rows=64, columns=16, num_warps=4, num_stages=4),
    False: Tiling(rows=128, columns=128, num_warps=8, num_stages=3),
}
_MIN_PROGRAMS = 512  # that read at once: four on each of 132 processors
_MIN_INPUTS_OF_PART = 4 * GROUP


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedWeight:
    numbers_NK: torch.Tensor  # int8 or float8_e4m3fn; for int4 uint8 [N, K/2]
    scales_NJ: torch.Tensor  # float32
    zeros_NJ: torch.Tensor | None  # float32, for int4
    order_K: torch.Tensor | None = None  # int64: the input of each number; None: number k is for input k

    def __post_init__(self) -> None:
        if self.numbers_NK.dtype not in (torch.int8, torch.float8_e4m3fn, torch.uint8):
            raise ValueError(
                f"weights must be int8, float8_e4m3fn or packed uint8, got {self.numbers_NK.dtype}"
            )
        if (self.zeros_NJ is not None) != self.is_packed:
            raise ValueError(f"weights of {self.numbers_NK.dtype}: int4 has zeros, the others have none")
        if self.group_size not in GROUPS or self.num_inputs % self.group_size:
            raise ValueError(
                f"{self.num_inputs} inputs with {self.scales_NJ.shape[1]} scales are not groups of"
                f" {', '.join(map(str, GROUPS))}"
            )
        wanted = (len(self.numbers_NK), self.num_inputs // self.group_size)
        for values in (self.scales_NJ, self.zeros_NJ):
            if values is not None and values.shape != wanted:
                raise ValueError(f"scales and zeros must be {wanted}, got {list(values.shape)}")
        if self.order_K is not None and self.order_K.shape != (self.num_inputs,):
            raise ValueError(f"an order of {list(self.order_K.shape)} for {self.num_inputs} inputs")

    @property
    def is_packed(self) -> bool:
        return self.numbers_NK.dtype == torch.uint8

    @property
    def num_inputs(self) -> int:
        return self.numbers_NK.shape[1] * (2 if self.is_packed else 1)

    @property
    def group_size(self) -> int:
        return self.num_inputs // max(1, self.scales_NJ.shape[1])

    def whole(self) -> torch.Tensor:
        """[N, K] in float32, of the inputs in their own order."""
        numbers_NK = self.numbers_NK
        if self.is_packed:
            bytes_NJH = numbers_NK.unflatten(1, (-1, self.group_size // 2))
            numbers_NK = torch.cat((bytes_NJH & 15, bytes_NJH >> 4), dim=-1).flatten(1)
        numbers_NJK = numbers_NK.float().unflatten(1, (-1, self.group_size))
        if self.zeros_NJ is not None:
            numbers_NJK = numbers_NJK - self.zeros_NJ.unsqueeze(-1)
        weight_NK = (numbers_NJK * self.scales_NJ.unsqueeze(-1)).flatten(1)
        if self.order_K is None:
            return weight_NK
        return torch.empty_like(weight_NK).index_copy_(1, self.order_K, weight_NK)


def pack_int4(numbers_NK: torch.Tensor, *, group_size: int) -> torch.Tensor:
    """uint8 [N, K/2] of numbers from 0 to 15, as an int4 weight has them."""
    low_NJH, high_NJH = numbers_NK.unflatten(1, (-1, group_size)).chunk(2, dim=-1)
    return (low_NJH | high_NJH << 4).flatten(1)


def reference(x_TK: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    return x_TK.float() @ weight.whole().T


@triton.jit(do_not_specialize=["num_tokens"])
def _kernel(
    x, stride_x, x_scales, numbers, scales, zeros, y, num_tokens,
    N: tl.constexpr, K: tl.constexpr, OUTPUTS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    J: tl.constexpr = K // GROUP
    WIDTH: tl.constexpr = GROUP // 2 if PACKED else GROUP
    # Tokens first: the tiles of tokens that need the same weights run at the same time.
    token_T = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    part = tl.program_id(2)
    # What lies outside is read from the edge and not written: no masks in the loop.
    x_T = x + tl.minimum(token_T, num_tokens - 1) * stride_x
    n_inside = tl.minimum(n, N - 1)
    numbers_N = numbers + n_inside.to(tl.int64) * (J * WIDTH)
    i = tl.arange(0, WIDTH)
    acc_NT = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    for j in tl.range(part * J // PARTS, (part + 1) * J // PARTS):
        q_NI = tl.load(numbers_N[:, None] + (j * WIDTH + i)[None, :])
        x_TI = tl.load(x_T[:, None] + (j * GROUP + i)[None, :])
        if PACKED:
            zero_N1 = tl.load(zeros + n_inside * J + j)[:, None]
            high_TI = tl.load(x_T[:, None] + (j * GROUP + WIDTH + i)[None, :])
            low_NI = ((q_NI & 15).to(tl.float32) - zero_N1).to(x_TI.dtype)
            high_NI = ((q_NI >> 4).to(tl.float32) - zero_N1).to(x_TI.dtype)
            product_NT = tl.dot(low_NI, tl.trans(x_TI), input_precision="ieee")
            product_NT = tl.dot(high_NI, tl.trans(high_TI), product_NT, input_precision="ieee")
        else:  # of fp8 by fp8 the tensor core would add up all groups by itself, in few bits
            product_NT = tl.dot(
                q_NI.to(x_TI.dtype), tl.trans(x_TI), input_precision="ieee", max_num_imprecise_acc=GROUP
            )
        acc_NT += product_NT * tl.load(scales + n_inside * J + j)[:, None]
    if x_scales is not None:
        acc_NT *= tl.load(x_scales + tl.minimum(token_T, num_tokens - 1))[None, :]
    place_TN = y + (part * num_tokens + token_T)[:, None] * N + n[None, :]
    inside_TN = (token_T < num_tokens)[:, None] & (n < N)[None, :]
    tl.store(place_TN, tl.trans(acc_NT).to(y.dtype.element_ty), mask=inside_TN)


def quantized_linear(x_TK: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """y [T, N] in the dtype of x."""
    return launch(x_TK, None, weight, dtype=x_TK.dtype)


def launch(
    x_TK: torch.Tensor, x_scales_T: torch.Tensor | None, weight: QuantizedWeight, *, dtype: torch.dtype
) -> torch.Tensor:
    """y [T, N]; rows of x times their scales, where they have them."""
    num_tokens, num_inputs = x_TK.shape
    num_outputs = len(weight.numbers_NK)
    if num_inputs != weight.num_inputs or x_TK.stride(1) != 1:
        raise ValueError(f"rows of {num_inputs} inputs for a weight of {weight.num_inputs}")
    if weight.order_K is not None:
        x_TK = x_TK.index_select(1, weight.order_K)
    is_few = num_tokens <= _FEW_TOKENS
    tiling = TILINGS[is_few]
    columns = max(tiling.columns, triton.next_power_of_2(num_tokens)) if is_few else tiling.columns
    parts = _num_parts(num_outputs, num_inputs, tiling) if is_few else 1
    y_ITN = x_TK.new_empty(parts, num_tokens, num_outputs, dtype=dtype if parts == 1 else torch.float32)
    if num_tokens:
        _kernel[(triton.cdiv(num_tokens, columns), triton.cdiv(num_outputs, tiling.rows), parts)](
            x_TK, x_TK.stride(0), x_scales_T, weight.numbers_NK, weight.scales_NJ, weight.zeros_NJ, y_ITN,
            num_tokens, N=num_outputs, K=num_inputs, OUTPUTS=tiling.rows, TOKENS=columns,
            GROUP=weight.group_size, PARTS=parts, PACKED=weight.is_packed, num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )  # fmt: skip
    return y_ITN[0] if parts == 1 else y_ITN.sum(0).to(dtype)


def _num_parts(num_outputs: int, num_inputs: int, tiling: Tiling) -> int:
    wanted = triton.cdiv(_MIN_PROGRAMS, triton.cdiv(num_outputs, tiling.rows))
    return max(1, min(wanted, num_inputs // _MIN_INPUTS_OF_PART))
