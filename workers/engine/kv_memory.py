"""What everybody but the kernels sees of the pages: blocks that go in and out as bytes, beside the steps.

S slots of an arena, X bytes of a block: all its layers one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # a bare GPU machine has no numpy
    import numpy as np
    from numpy.typing import NDArray

    from kvstore.layout import KvLayout

    Arena = NDArray[np.uint8]
    Decode = Callable[[Arena, Sequence[int]], None]


class KvMemory(Protocol):
    """Pages of all layers. Who owns which page is decided elsewhere, and nobody writes one that others use.

    Pages are read and written in any thread, beside a step that computes on others. Who waits here does not hold the
    interpreter lock. What a call has written is seen by all calls and steps that begin after it.
    """

    @property
    def layout(self) -> KvLayout: ...

    @property
    def num_pages(self) -> int: ...

    def read(self, *, layer: int, page_ids: Sequence[int], into: memoryview) -> None:
        """Copies the blocks of `page_ids` in order to `into`, which holds exactly their bytes."""
        ...

    def write(self, *, layer: int, page_ids: Sequence[int], data: memoryview) -> None:
        """Copies the blocks in `data` to the pages of `page_ids` in order; all ids differ."""
        ...

    def save(self, page_ids: Sequence[int], arena_SX: Arena, slots: Sequence[int]) -> None:
        """Copies the blocks in `page_ids` to `slots`, one each."""
        ...

    def load(self, page_ids: Sequence[int], arena_SX: Arena, slots: Sequence[int]) -> None:
        """Copies the blocks in `slots` to `page_ids`, one each; all ids differ."""
        ...

    def fill(self, page_ids: Sequence[int], decode: Decode) -> None:
        """Calls `decode(memory, slots)`, which fills these slots of memory; the pages then hold them in order.

        If it raises, the pages hold nothing of use. The memory is an arena, or the pages themselves [P, L, X / L].
        """
        ...

    def step(self) -> AbstractContextManager[Callable[[], None]]:
        """A step is launched within, and finds what was written before. Afterwards, what this gives waits until the
        step is over on the device. One that is broken off is over when this is left."""
        ...
