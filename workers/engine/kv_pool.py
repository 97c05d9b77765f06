"""The memory of KV pages on a CPU, and its blocks as bytes for other workers and for the tiers below.

L layers, P pages, G key/value heads, B tokens per page, C head dimension, X bytes, W words of 8 bytes, S slots of an
arena. A page of a layer lies in memory exactly as a block does on the wire (keys, then values), so a transfer is one
copy; a slot holds all layers of a block one after the other.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kvstore.layout import KvLayout

if TYPE_CHECKING:
    from workers.engine.kv_memory import Arena, Decode


class KvPool:
    """Pages of all layers, allocated once. Who owns which page is decided elsewhere.

    `save` and `load` release the interpreter lock: they are called in threads, beside the engine.
    """

    def __init__(self, layout: KvLayout, *, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.layout = layout
        self.num_pages = num_pages
        # The system hands out zeroed memory page by page on first use: what is never used costs nothing, and a start
        # does not wait for it. torch.zeros writes all of it: 0.5 s of one core a GiB (AMD EPYC).
        memory = mmap.mmap(-1, num_pages * layout.block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.pages_LP2GBC = torch.frombuffer(memory, dtype=getattr(torch, layout.dtype)).view(
            layout.num_layers, num_pages, 2, layout.num_kv_heads, layout.block_size_tokens, layout.head_dim
        )
        self._bytes_LPX = self.pages_LP2GBC.view(torch.uint8).view(layout.num_layers, num_pages, -1).numpy()
        self._words_LPW = self._bytes_LPX.view(np.uint64)

    @property
    def blocks_PLX(self) -> npt.NDArray[np.uint8]:
        """The pages as memory that the codec writes to."""
        return self._bytes_LPX.transpose(1, 0, 2)

    def read(self, *, layer: int, page_ids: Sequence[int], into: memoryview) -> None:
        """Copies the blocks of `page_ids` in order to `into`, which holds exactly their bytes."""
        blocks = self._as_blocks(into, len(page_ids))
        # Checked above, so clipping never happens; "raise" would copy through a buffer.
        np.take(self._bytes_LPX[layer], self._checked(page_ids), axis=0, out=blocks, mode="clip")

    def write(self, *, layer: int, page_ids: Sequence[int], data: memoryview) -> None:
        """Copies the blocks in `data` to the pages of `page_ids` in order; all ids differ."""
        self._bytes_LPX[layer][self._checked(page_ids)] = self._as_blocks(data, len(page_ids))

    def save(self, page_ids: Sequence[int], arena_SX: Arena, slots: Sequence[int]) -> None:
        """Copies the blocks in `page_ids` to `slots`, one each."""
        _save(self._words_LPW, self._checked(page_ids), *self._as_slots(arena_SX, slots, len(page_ids)))

    def load(self, page_ids: Sequence[int], arena_SX: Arena, slots: Sequence[int]) -> None:
        """Copies the blocks in `slots` to `page_ids`, one each; all ids differ."""
        _load(self._words_LPW, self._checked(page_ids), *self._as_slots(arena_SX, slots, len(page_ids)))

    def fill(self, page_ids: Sequence[int], decode: Decode) -> None:
        """Straight into the pages, in which the codec writes as in an arena."""
        decode(self.blocks_PLX, self._checked(page_ids).tolist())

    def step(self) -> AbstractContextManager[Callable[[], None]]:
        return nullcontext(lambda: None)

    def _as_slots(
        self, arena_SX: Arena, slots: Sequence[int], num_blocks: int
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        if arena_SX.shape[1] != self.layout.block_bytes:
            raise ValueError(f"a slot must have {self.layout.block_bytes} bytes, got {arena_SX.shape[1]}")
        numbers = np.array(slots, dtype=np.int64)
        if len(numbers) != num_blocks or (numbers < 0).any() or (numbers >= len(arena_SX)).any():
            raise ValueError(f"{num_blocks} blocks need as many slots of {len(arena_SX)}, got {list(slots)}")
        num_layers = self.layout.num_layers
        return arena_SX.view(np.uint64).reshape(len(arena_SX), num_layers, -1), numbers

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


raw_memcpy: Any = cgutils.raw_memcpy


def _memcpy(typing: Any, target: Any, source: Any, num_bytes: Any) -> Any:
    """memcpy of addresses: 9.7 GB/s for 16 KiB pieces where a loop over words has 5.4 (AMD EPYC, one core)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        addresses = [builder.inttoptr(address, cgutils.voidptr_t) for address in arguments[:2]]
        raw_memcpy(builder, *addresses, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


_copy: Any = intrinsic(_memcpy)


# Compiled when the module is imported, and kept on disk: compiling holds the lock for a second.
_COPY = "void(uint64[:, :, ::1], int64[::1], uint64[:, :, ::1], int64[::1])"


@njit(_COPY, cache=True, nogil=True)
def _save(
    words_LPW: npt.NDArray[np.uint64],
    page_ids: npt.NDArray[np.int64],
    arena_SLW: npt.NDArray[np.uint64],
    slots: npt.NDArray[np.int64],
) -> None:
    num_layers, num_pages, piece_bytes = words_LPW.shape[0], words_LPW.shape[1], words_LPW.shape[2] * 8
    pages, arena = words_LPW.ctypes.data, arena_SLW.ctypes.data
    for position in range(len(page_ids)):
        for layer in range(num_layers):
            slot = slots[position] * num_layers + layer
            page = layer * num_pages + page_ids[position]
            _copy(arena + slot * piece_bytes, pages + page * piece_bytes, piece_bytes)


@njit(_COPY, cache=True, nogil=True)
def _load(
    words_LPW: npt.NDArray[np.uint64],
    page_ids: npt.NDArray[np.int64],
    arena_SLW: npt.NDArray[np.uint64],
    slots: npt.NDArray[np.int64],
) -> None:
    num_layers, num_pages, piece_bytes = words_LPW.shape[0], words_LPW.shape[1], words_LPW.shape[2] * 8
    pages, arena = words_LPW.ctypes.data, arena_SLW.ctypes.data
    for position in range(len(page_ids)):
        for layer in range(num_layers):
            slot = slots[position] * num_layers + layer
            page = layer * num_pages + page_ids[position]
            _copy(pages + page * piece_bytes, arena + slot * piece_bytes, piece_bytes)
