"""The memory tier: one arena of equal slots, and the book of what is in them."""

import numpy as np
from numpy.typing import NDArray

from kvstore.residency import Residency


class MemoryTier:
    """`buffer` is the caller's, who may have page-locked it; what does not fill a slot at its end stays unused."""

    def __init__(self, buffer: NDArray[np.uint8], *, block_bytes: int, policy: str) -> None:
        num_slots = buffer.size // block_bytes
        if num_slots < 1:
            raise ValueError(f"{buffer.size} bytes hold no block of {block_bytes} bytes")
        self.arena_SX = buffer.reshape(-1)[: num_slots * block_bytes].reshape(num_slots, block_bytes)
        self.residency = Residency(num_slots, policy=policy)

    @property
    def block_bytes(self) -> int:
        return self.arena_SX.shape[1]
