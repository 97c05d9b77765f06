"""Raw KV of a peer, on its way into this worker's memory: bytes of which we know no more than how many they are."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.codec.finite import is_finite
from kvstore.errors import TransferCorrupted
from kvstore.layout import KvLayout
from kvstore.transfer import BlockMemory
from workers.errors import PullCorrupted


def copy_raw(
    payload: memoryview, arena_SX: NDArray[np.uint8], slots: Sequence[int], layout: KvLayout
) -> None:
    """Raises PullCorrupted for KV that is no number: who attends to that gets arbitrary tokens, and passes it on."""
    blocks = np.frombuffer(payload, np.uint8).reshape(len(slots), -1)
    for position, (block, slot) in enumerate(zip(blocks, slots, strict=True)):
        arena_SX[slot] = block
        if not is_finite(arena_SX[slot], layout=layout):
            raise PullCorrupted(f"raw block {position} of {len(slots)} in a chunk holds NaN or infinity")


class FinitePages:
    """Device pages that take no KV of a hand-over that is no number: 0.1 ms for a frame of 1 MiB (Xeon)."""

    def __init__(self, pages: BlockMemory) -> None:
        self._pages = pages

    @property
    def layout(self) -> KvLayout:
        return self._pages.layout

    @property
    def num_pages(self) -> int:
        return self._pages.num_pages

    def read(self, *, layer: int, page_ids: Sequence[int], into: memoryview) -> None:
        self._pages.read(layer=layer, page_ids=page_ids, into=into)

    def write(self, *, layer: int, page_ids: Sequence[int], data: memoryview) -> None:
        """Raises TransferCorrupted."""
        if not is_finite(np.frombuffer(data, np.uint8), layout=self.layout):
            raise TransferCorrupted(f"{len(page_ids)} blocks of layer {layer} hold NaN or infinity")
        self._pages.write(layer=layer, page_ids=page_ids, data=data)
