"""Weights of 8 or 4 bits: W_nk = (q_nk - zero_nj) scale_nj for the k of group j, and the product of one group.

int8 and fp8 (e4m3) have a scale for each group and no zero. int4 has a zero too, in steps; two numbers share a byte,
half a group apart, so that they need not be interleaved again: byte i of a group has number i in its low and number
i + GROUP/2 in its high half. A weight may have its inputs in an order of its own, in which groups are of inputs that
are alike; x is brought into it first.

N outputs, of experts those of all, one expert's below another's; K inputs, J = K / GROUP groups, E experts (one where a
layer has none).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

GROUPS = (128, 64, 32)  # int4 is two halves of a group, and a tensor core takes 16 inputs at once, of fp8 32
GROUP = GROUPS[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedWeight:
    numbers_NK: torch.Tensor  # int8 or float8_e4m3fn; for int4 uint8 [N, K/2]
    scales_NJ: torch.Tensor  # float32
    zeros_NJ: torch.Tensor | None  # float32, for int4
    orders_EK: torch.Tensor | None = None  # int64: the input of each number; None: number k is for input k

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
        orders = self.orders_EK
        if orders is not None and (orders.shape[1] != self.num_inputs or len(self.numbers_NK) % len(orders)):
            raise ValueError(f"orders of {list(orders.shape)} for {self.num_inputs} inputs")

    @property
    def is_packed(self) -> bool:
        return self.numbers_NK.dtype == torch.uint8

    @property
    def is_fp8(self) -> bool:
        return self.numbers_NK.dtype == torch.float8_e4m3fn

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
        if self.orders_EK is None:
            return weight_NK
        orders_NK = self.orders_EK.repeat_interleave(len(weight_NK) // len(self.orders_EK), dim=0)
        return torch.empty_like(weight_NK).scatter_(1, orders_NK, weight_NK)


def pack_int4(numbers_NK: torch.Tensor, *, group_size: int) -> torch.Tensor:
    """uint8 [N, K/2] of numbers from 0 to 15, as an int4 weight has them."""
    low_NJH, high_NJH = numbers_NK.unflatten(1, (-1, group_size)).chunk(2, dim=-1)
    return (low_NJH | high_NJH << 4).flatten(1)


def stacked(experts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight of all experts, which are quantised alike."""
    zeros = [expert.zeros_NJ for expert in experts if expert.zeros_NJ is not None]
    if any(expert.orders_EK is not None for expert in experts):
        in_order_EK = torch.arange(experts[0].num_inputs, device=experts[0].scales_NJ.device).unsqueeze(0)
        orders_EK = torch.cat(
            [in_order_EK if expert.orders_EK is None else expert.orders_EK for expert in experts]
        )
    else:
        orders_EK = None
    return QuantizedWeight(
        numbers_NK=torch.cat([expert.numbers_NK for expert in experts]),
        scales_NJ=torch.cat([expert.scales_NJ for expert in experts]),
        zeros_NJ=torch.cat(zeros) if zeros else None,
        orders_EK=orders_EK,
    )


@triton.jit
def add_group(
    acc_NT, x_T, numbers_N, scales, zeros, place_N, j, GROUP: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """acc and the product of group j: of rows of x that begin at x_T with rows of numbers that begin at numbers_N.

    The scales and zeros of a row of numbers begin at place_N. What is multiplied are the whole numbers q - zero, exact
    in bfloat16; the product is scaled in float32.
    """
    WIDTH: tl.constexpr = GROUP // 2 if PACKED else GROUP
    i = tl.arange(0, WIDTH)
    q_NI = tl.load(numbers_N[:, None] + (j * WIDTH + i)[None, :])
    x_TI = tl.load(x_T[:, None] + (j * GROUP + i)[None, :])
    if PACKED:
        zero_N1 = tl.load(zeros + place_N + j)[:, None]
        high_TI = tl.load(x_T[:, None] + (j * GROUP + WIDTH + i)[None, :])
        low_NI = ((q_NI & 15).to(tl.float32) - zero_N1).to(x_TI.dtype)
        high_NI = ((q_NI >> 4).to(tl.float32) - zero_N1).to(x_TI.dtype)
        product_NT = tl.dot(low_NI, tl.trans(x_TI), input_precision="ieee")
        product_NT = tl.dot(high_NI, tl.trans(high_TI), product_NT, input_precision="ieee")
    else:  # of fp8 by fp8 the tensor core would add up all groups by itself, in few bits
        product_NT = tl.dot(
            q_NI.to(x_TI.dtype), tl.trans(x_TI), input_precision="ieee", max_num_imprecise_acc=GROUP
        )
    return acc_NT + product_NT * tl.load(scales + place_N + j)[:, None]
