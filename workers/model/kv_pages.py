"""The pages of keys and values on a device: whole numbers, or int8 and fp8 with a scale for each token and head.

L layers, P pages, G key/value heads, B tokens per page, C head dimension.
"""

from dataclasses import dataclass

import torch

from workers.model.config import ModelConfig

PAGE_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}  # fmt: skip
_SCALED = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, kw_only=True, slots=True)
class KvPages:
    pages_LP2GBC: torch.Tensor
    scales_LP2GB: torch.Tensor | None  # float32, for int8 and fp8


def allocate_pages(
    config: ModelConfig, *, num_pages: int, block: int, dtype: torch.dtype, device: torch.device
) -> KvPages:
    shape = (len(config.layers), num_pages, 2, config.num_kv_heads, block)
    # As bytes: not every torch can fill fp8 with zeros. Zeros, so that a page nobody wrote holds no NaN.
    item_bytes = dtype.itemsize
    memory = torch.zeros(*shape, config.head_dim * item_bytes, dtype=torch.uint8, device=device)
    scales = torch.zeros(shape, dtype=torch.float32, device=device) if dtype in _SCALED else None
    return KvPages(pages_LP2GBC=memory.view(dtype), scales_LP2GB=scales)
