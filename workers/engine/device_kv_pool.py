"""The pages of keys and values on a device, and its blocks as bytes by copies that run beside the steps.

Steps run on the engine's stream, copies on a stream of their own: pages are gathered into contiguous staging memory of
the device, or scattered from it, and staging is copied from or to page-locked memory of this machine.

    read, save           pages ─gather─▶ staging ──copy──▶ page-locked memory  the caller waits for this copy
    write, load, fill    page-locked memory ──copy──▶ staging ─scatter─▶ pages the next step waits for these pages

Why nobody sees half a block:

- *A copy after a step.* A step is over on the device before its result is told, and a layer's KV lies there before
  `on_layer` names it (`workers.engine.device_forward`). Who copies a page out has heard of it by one of the two, so
  what the copy stream is given afterwards finds it there, and waits for nothing of the engine's stream.
- *A step after a copy.* `step` makes the engine's stream wait for all that the copy stream was given until then. Pages
  that a step uses were written before it was planned.
- *A copy beside a step.* The pages of a step are written by nobody else, as on a CPU: their owner decides that. A step
  that was launched ahead may write to a page of a request that has ended meanwhile; nothing is copied there before that
  step is over, too (`workers.look_ahead`).
- *A copy after a copy.* There is one copy stream, and it runs in order. So a page is read as the last `write` left it,
  and staging is used again only when what used it before is done. The page-locked half of staging is filled and
  emptied by this machine: under a lock, and only after the copies that it was given to are done.

Staging is bounded: what is larger goes in pieces. On a CPU the same runs without streams, one call after the other.

N blocks, S slots of an arena, X bytes of a block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from kvstore.layout import KvLayout
from workers.engine.copy_stream import CopyStream
from workers.engine.page_words import PageWords
from workers.model.kv_pages import KvPages

if TYPE_CHECKING:
    from workers.engine.kv_memory import Arena, Decode

# A piece takes a third of a millisecond over PCIe 5, in which others wait for their turn.
STAGING_BYTES = 8 << 20
_ALL = slice(None)  # layers


class DeviceKvPool:
    """The first `num_pages` of pages that somebody else allocated. Who owns which page is decided elsewhere."""

    def __init__(
        self,
        layout: KvLayout,
        pages: KvPages,
        *,
        num_pages: int,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        num_allocated = pages.pages_LP2GBC.shape[1]
        if not 1 <= num_pages <= num_allocated:
            raise ValueError(f"num_pages must be between 1 and {num_allocated}, got {num_pages}")
        self.layout = layout
        self.num_pages = num_pages
        self.pages = pages
        self._device = pages.pages_LP2GBC.device
        self._words = PageWords(pages)
        num_bytes = max(staging_bytes // layout.block_bytes, 1) * layout.block_bytes
        self._staging = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._host = _page_locked(num_bytes, device=self._device)
        self._copies = CopyStream(self._device)
        self._lock = threading.Lock()
        # A page onto itself: its kernels are compiled before somebody waits for them.
        with self._copies.launching():
            self._scatter(_ALL, [0], self._gathered(_ALL, [0]))

    @contextmanager
    def step(self) -> Iterator[Callable[[], None]]:
        if self._device.type != "cuda":
            yield lambda: None
            return
        with torch.cuda.device(self._device):
            stream, over = torch.cuda.current_stream(), torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copies.precede(stream)
            try:
                yield over.synchronize
            except BaseException:
                stream.synchronize()  # its pages go to others
                raise
            over.record(stream)

    def read(self, *, layer: int, page_ids: Sequence[int], into: memoryview) -> None:
        self._check_pages(page_ids)
        self._check_size(into, len(page_ids))
        for start, stop in self._pieces(len(page_ids), num_layers=1):
            with self._lock:
                with self._copies.launching():
                    staging_NX = self._gathered(slice(layer, layer + 1), page_ids[start:stop])
                    host_NX = self._host[: staging_NX.numel()].view_as(staging_NX)
                    host_NX.copy_(staging_NX, non_blocking=True)
                self._copies.wait()
                _as_tensor(into).view(len(page_ids), -1)[start:stop].copy_(host_NX)

    def write(self, *, layer: int, page_ids: Sequence[int], data: memoryview) -> None:
        self._check_pages(page_ids)
        self._check_size(data, len(page_ids))
        if not page_ids:  # torch takes no empty memory
            return
        data_NX = _as_tensor(data).view(len(page_ids), -1)
        self._put(slice(layer, layer + 1), page_ids, data_NX)

    def save(self, page_ids: Sequence[int], arena_SX: Arena | torch.Tensor, slots: Sequence[int]) -> None:
        """Straight into the arena, which runs beside all else if it is page-locked."""
        slots_SX = self._checked_arena(page_ids, arena_SX, slots)
        for start, stop in self._pieces(len(page_ids), num_layers=self.layout.num_layers):
            with self._lock, self._copies.launching_and_waiting():
                staging_NX = self._gathered(_ALL, page_ids[start:stop])
                for places, run in consecutive(slots[start:stop]):
                    slots_SX[run].copy_(staging_NX[places], non_blocking=True)

    def load(self, page_ids: Sequence[int], arena_SX: Arena | torch.Tensor, slots: Sequence[int]) -> None:
        """Straight from the arena; when this returns, its slots may be filled with others."""
        slots_SX = self._checked_arena(page_ids, arena_SX, slots)
        for start, stop in self._pieces(len(page_ids), num_layers=self.layout.num_layers):
            with self._lock, self._copies.launching_and_waiting():
                num_bytes = (stop - start) * self.layout.block_bytes
                staging_NX = self._staging[:num_bytes].view(stop - start, -1)
                for places, run in consecutive(slots[start:stop]):
                    staging_NX[places].copy_(slots_SX[run], non_blocking=True)
                self._scatter(_ALL, page_ids[start:stop], staging_NX)

    def fill(self, page_ids: Sequence[int], decode: Decode) -> None:
        """By way of memory that is not page-locked: a chunk is decoded whole, and may be larger than staging."""
        self._check_pages(page_ids)
        memory_NX = torch.empty(len(page_ids), self.layout.block_bytes, dtype=torch.uint8)
        decode(memory_NX.numpy(), range(len(page_ids)))
        self._put(_ALL, page_ids, memory_NX)

    def _put(self, layers: slice, page_ids: Sequence[int], data_NX: torch.Tensor) -> None:
        for start, stop in self._pieces(len(page_ids), num_layers=self._num(layers)):
            with self._lock:
                self._copies.wait()  # one of them may still read what we fill now
                host_NX = self._host[: (stop - start) * data_NX.shape[1]].view(stop - start, -1)
                host_NX.copy_(data_NX[start:stop])
                with self._copies.launching():
                    staging_NX = self._staging[: host_NX.numel()].view_as(host_NX)
                    staging_NX.copy_(host_NX, non_blocking=True)
                    self._scatter(layers, page_ids[start:stop], staging_NX)

    def _gathered(self, layers: slice, page_ids: Sequence[int]) -> torch.Tensor:
        num_bytes = len(page_ids) * self._num(layers) * self.layout.layer_block_bytes
        staging_NX = self._staging[:num_bytes].view(len(page_ids), -1)
        self._words.gather_(layers, page_ids, self._as_words(layers, staging_NX))
        return staging_NX

    def _scatter(self, layers: slice, page_ids: Sequence[int], staging_NX: torch.Tensor) -> None:
        self._words.scatter_(layers, page_ids, self._as_words(layers, staging_NX))

    def _as_words(self, layers: slice, staging_NX: torch.Tensor) -> torch.Tensor:
        return staging_NX.view(torch.int64).view(len(staging_NX), self._num(layers), -1)

    def _num(self, layers: slice) -> int:
        return len(range(self.layout.num_layers)[layers])

    def _pieces(self, num_blocks: int, *, num_layers: int) -> Iterator[tuple[int, int]]:
        """(first, end) of as many blocks of so many layers as fit into staging."""
        piece = len(self._host) // (num_layers * self.layout.layer_block_bytes)
        for start in range(0, num_blocks, piece):
            yield start, min(start + piece, num_blocks)

    def _check_pages(self, page_ids: Sequence[int]) -> None:
        for page_id in page_ids:
            if not 0 <= page_id < self.num_pages:
                raise ValueError(f"page ids must be in 0..{self.num_pages - 1}, got {page_id}")

    def _check_size(self, memory: memoryview, num_blocks: int) -> None:
        expected_bytes = num_blocks * self.layout.layer_block_bytes
        if memory.nbytes != expected_bytes:
            raise ValueError(
                f"{num_blocks} blocks of a layer are {expected_bytes} bytes, got {memory.nbytes}"
            )

    def _checked_arena(
        self, page_ids: Sequence[int], arena_SX: Arena | torch.Tensor, slots: Sequence[int]
    ) -> torch.Tensor:
        if arena_SX.shape[1] != self.layout.block_bytes:
            raise ValueError(f"a slot must have {self.layout.block_bytes} bytes, got {arena_SX.shape[1]}")
        if len(slots) != len(page_ids) or not all(0 <= slot < len(arena_SX) for slot in slots):
            raise ValueError(
                f"{len(page_ids)} blocks need as many slots of {len(arena_SX)}, got {list(slots)}"
            )
        self._check_pages(page_ids)
        return torch.as_tensor(arena_SX)


def consecutive(slots: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """The runs of slots that follow each other: where they stand among `slots`, and which they are."""
    start = 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] != slots[end - 1] + 1:
            yield slice(start, end), slice(slots[start], slots[end - 1] + 1)
            start = end


def _page_locked(num_bytes: int, *, device: torch.device) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def _as_tensor(memory: memoryview) -> torch.Tensor:
    # torch takes no memory that must not be written.
    return torch.frombuffer(bytearray(memory) if memory.readonly else memory, dtype=torch.uint8)
