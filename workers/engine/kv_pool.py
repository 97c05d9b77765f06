"""The memory of KV pages, and its blocks as bytes for other workers.

L layers, P pages, G key/value heads, B tokens per page, C head dimension. A page of a layer lies in memory exactly as
a block does on the wire (keys, then values), so a transfer is one copy.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvstore.layout import KvLayout


class KvPool:
    """Pages of all layers, allocated once. Who owns which page is decided elsewhere."""

    def __init__(self, layout: KvLayout, *, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.layout = layout
        self.num_pages = num_pages
        # The system hands out zeroed memory page by page on first use: what is never used costs nothing.
        self.pages_LP2GBC = torch.zeros(
            layout.num_layers, num_pages, 2, layout.num_kv_heads, layout.block_size_tokens, layout.head_dim,
            dtype=getattr(torch, layout.dtype),
        )  # fmt: skip
        self._bytes_LPX = self.pages_LP2GBC.view(torch.uint8).view(layout.num_layers, num_pages, -1).numpy()

    def read(self, *, layer: int, page_ids: Sequence[int], into: memoryview) -> None:
        """Copies the blocks of `page_ids` in order to `into`, which holds exactly their bytes."""
        blocks = self._as_blocks(into, len(page_ids))
        # Checked above, so clipping never happens; "raise" would copy through a buffer.
        np.take(self._bytes_LPX[layer], self._checked(page_ids), axis=0, out=blocks, mode="clip")

    def write(self, *, layer: int, page_ids: Sequence[int], data: memoryview) -> None:
        """Copies the blocks in `data` to the pages of `page_ids` in order; all ids differ."""
        self._bytes_LPX[layer][self._checked(page_ids)] = self._as_blocks(data, len(page_ids))

    def _as_blocks(self, memory: memoryview, num_blocks: int) -> npt.NDArray[np.uint8]:
        expected_bytes = num_blocks * self.layout.layer_block_bytes
        if memory.nbytes != expected_bytes:
            raise ValueError(
                f"{num_blocks} blocks of a layer are {expected_bytes} bytes, got {memory.nbytes}"
            )
        return np.frombuffer(memory, dtype=np.uint8).reshape(num_blocks, self.layout.layer_block_bytes)

    def _checked(self, page_ids: Sequence[int]) -> npt.NDArray[np.int64]:
        ids = np.array(page_ids, dtype=np.int64)
        wrong = ids[(ids < 0) | (ids >= self.num_pages)]
        if len(wrong):
            raise ValueError(f"page ids must be in 0..{self.num_pages - 1}, got {wrong[0]}")
        return ids
