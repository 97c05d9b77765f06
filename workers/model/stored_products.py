"""What the GPU's products multiply as it is: matrices that a checkpoint has quantised, or that are quantised from it.

N outputs, K inputs, J groups.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from kernels.gpu.quantized_weight import GROUPS, QuantizedWeight, pack_int4, stacked
from workers.model.grouped_numbers import GroupedNumbers, PackedMatrix
from workers.model.quantize import quantized_product
from workers.model.quantized_checkpoint import QuantizedCheckpoint
from workers.model.weights import Stored, Tensors


def products_of(checkpoint: Tensors, quantize: str) -> Stored | None:
    """None where all are whole. What is to be quantised anew is made whole first."""
    if quantize != "none":
        return partial(quantized_product, checkpoint, quantize)
    return partial(stored_product, checkpoint) if isinstance(checkpoint, QuantizedCheckpoint) else None


def stored_product(
    checkpoint: QuantizedCheckpoint,
    names_E: Sequence[Mapping[str, int]],
    num_inputs: int,
    device: torch.device,
) -> QuantizedWeight | None:
    """The rows of all names as one matrix, one expert's below another's.

    None: they are to be whole, because some are, or no kernel takes them. Raises `CheckpointError`.
    """
    if not all(checkpoint.is_packed(name) for names in names_E for name in names):
        return None
    experts = []
    for names in names_E:
        matrices = [
            PackedMatrix(name=name, num_outputs=num_outputs, num_inputs=num_inputs)
            for name, num_outputs in names.items()
        ]
        merged = _merged([checkpoint.grouped(matrix, device) for matrix in matrices])
        if merged is None:
            return None
        experts.append(merged)
    return stacked(experts)


def _merged(parts: Sequence[GroupedNumbers]) -> QuantizedWeight | None:
    order_K, num_groups = parts[0].order_K, parts[0].scales_NJ.shape[1]
    size = parts[0].numbers_NK.shape[1] // num_groups
    group_size = next((group_size for group_size in GROUPS if size % group_size == 0), None)
    # What reads the same inputs has them in the same order, as it was quantised for the same inputs.
    if group_size is None or not all(_same(part.order_K, order_K) for part in parts):
        return None
    orders_EK = None if order_K is None else order_K.unsqueeze(0)
    numbers_NK = torch.cat([part.numbers_NK for part in parts])
    zeros_NJ = torch.cat([part.zeros_NJ for part in parts])
    scales_NJ = torch.cat([part.scales_NJ for part in parts]).repeat_interleave(size // group_size, dim=1)
    if parts[0].bits == 4:
        return QuantizedWeight(
            numbers_NK=pack_int4(numbers_NK, group_size=group_size), scales_NJ=scales_NJ,
            zeros_NJ=zeros_NJ.repeat_interleave(size // group_size, dim=1).float(), orders_EK=orders_EK,
        )  # fmt: skip
    differences_NK = numbers_NK.to(torch.int16) - zeros_NJ.repeat_interleave(size, dim=1)
    if int(differences_NK.min()) < -128 or int(differences_NK.max()) > 127:
        return None  # int8 has no zero, and these need nine bits without theirs
    return QuantizedWeight(
        numbers_NK=differences_NK.to(torch.int8), scales_NJ=scales_NJ, zeros_NJ=None, orders_EK=orders_EK
    )


def _same(order_K: torch.Tensor | None, other_K: torch.Tensor | None) -> bool:
    return order_K is other_K or (
        order_K is not None and other_K is not None and torch.equal(order_K, other_K)
    )
