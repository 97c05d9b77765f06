"""Matrices as AWQ and GPTQ checkpoints pack them, written a number at a time, and the weights that they stand for.

N outputs, K inputs, J groups.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class Packing:
    method: str = "gptq"
    bits: int = 4
    group_size: int = 128  # -1: all inputs
    acts_in_order: bool = False
    v2: bool = False
    symmetric: bool = False

    def config(self) -> dict[str, Any]:
        shared = {"quant_method": self.method, "bits": self.bits, "group_size": self.group_size}
        if self.method == "awq":
            return {**shared, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
        written = "gptq_v2" if self.v2 else "gptq"
        return {
            **shared, "sym": self.symmetric, "desc_act": self.acts_in_order, "checkpoint_format": written,
            "lm_head": False, "meta": {"quantizer": ["somebody:1.0"]},
        }  # fmt: skip


def pack(weight_NK: torch.Tensor, packing: Packing) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(what a file has of the matrix, by the end of its name; the weights that it stands for)."""
    num_inputs = weight_NK.shape[1]
    size = num_inputs if packing.group_size == -1 else packing.group_size
    group_K = torch.arange(num_inputs) // size
    if packing.acts_in_order:  # of all that read as many inputs alike, as if these were the same
        group_K = group_K[torch.randperm(num_inputs, generator=torch.Generator().manual_seed(num_inputs))]
    top = 2**packing.bits - 1
    scales_JN, zeros_JN = [], []
    for group in range(num_inputs // size):
        weight_NG = weight_NK[:, group_K == group]
        low_N, high_N = weight_NG.amin(1).clamp(max=0), weight_NG.amax(1).clamp(min=0)
        if packing.symmetric:
            high_N = torch.maximum(-low_N, high_N)
            low_N = -high_N
        scale_N = ((high_N - low_N) / top).clamp(min=1e-5).half().float()
        scales_JN.append(scale_N)
        zero_N = torch.full_like(scale_N, (top + 1) // 2) if packing.symmetric else -low_N / scale_N
        zeros_JN.append(zero_N.round().clamp(1, top))
    scale_KN, zero_KN = torch.stack(scales_JN)[group_K], torch.stack(zeros_JN)[group_K]
    numbers_KN = ((weight_NK.T / scale_KN).round() + zero_KN).clamp(0, top)
    tensors = {"scales": torch.stack(scales_JN).half()}
    zeros = torch.stack(zeros_JN).long()
    if packing.method == "awq":
        tensors["qweight"] = words(numbers_KN.long(), bits=4, places=AWQ_OUTPUTS)
        tensors["qzeros"] = words(zeros, bits=4, places=AWQ_OUTPUTS)
    else:
        tensors["qweight"] = words(numbers_KN.long().T, bits=packing.bits).T.contiguous()
        tensors["qzeros"] = words(zeros - (0 if packing.v2 else 1), bits=packing.bits)
        tensors["g_idx"] = group_K.int()
    return tensors, ((numbers_KN - zero_KN) * scale_KN).T.contiguous()


def words(
    numbers_XY: torch.Tensor, *, bits: int, places: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
) -> torch.Tensor:
    """int32 along Y; `places`: which number of a word's is first, in the lowest bits, and so on."""
    count = 32 // bits
    total = torch.zeros(len(numbers_XY), numbers_XY.shape[1] // count, dtype=torch.int64)
    for shift in range(count):
        total |= numbers_XY[:, places[shift] :: count] << (bits * shift)
    return torch.where(total >= 2**31, total - 2**32, total).int()


def pack_all(
    tensors: dict[str, torch.Tensor], packing: Packing, *, wanted: tuple[str, ...] = ("_proj.weight",)
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(the tensors of a file, with those packed whose names end as wanted; the weights that they stand for)."""
    file, meant = {}, {}
    for name, tensor in tensors.items():
        if name.endswith(wanted):
            packed, meant[name] = pack(tensor, packing)
            file |= {name.removesuffix("weight") + end: one for end, one in packed.items()}
        else:
            file[name] = meant[name] = tensor
    return file, meant


def write_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file, for where its library is not installed."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.int32: "I32"}
    header, data = {}, b""
    for name, tensor in tensors.items():
        start = len(data)
        data += bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        header[name] = {
            "dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, len(data)]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
