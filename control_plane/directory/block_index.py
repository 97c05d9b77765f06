"""Which worker or store holds which blocks, and where: hints, bounded in size, wrong at worst for a moment."""

from collections.abc import Iterator, Sequence

import numpy as np

from control_plane.directory.block_events import BlockEvents
from control_plane.directory.holder_table import HolderTable, digests_of
from control_plane.directory.member import WorkerId
from control_plane.directory.overlap import Overlap
from kvstore.blocks import BlockKey
from kvstore.tiers.tier import Tier

# The code of a tier in the table; 0 is a block that is not held.
_FIRST_CODE = 1
_DEVICE_CODE, _MEMORY_CODE, _DISK_CODE = (
    _FIRST_CODE + tier for tier in (Tier.DEVICE, Tier.MEMORY, Tier.DISK)
)


class BlockIndex:
    """Mutated by `apply` and `forget`; a lookup keeps what it finds from being forgotten.

    When it is full, the block goes that was neither announced nor looked up for the longest time, by whomever;
    see `holder_table`. A worker that is forgotten to hold something announces it again when it stores it anew or
    is asked for everything.
    """

    def __init__(self, *, max_blocks: int) -> None:
        if max_blocks < 1:
            raise ValueError(f"max_blocks must be positive, got {max_blocks}")
        self._table = HolderTable(max_blocks)
        self._holders: dict[WorkerId, int] = {}
        self._names: dict[int, WorkerId] = {}
        self._last_sequence: dict[WorkerId, int] = {}

    @property
    def is_empty(self) -> bool:
        return not self._holders

    @property
    def num_blocks(self) -> int:
        """Different blocks known, those included that nobody holds any more."""
        return self._table.num_blocks

    @property
    def num_bytes(self) -> int:
        return self._table.num_bytes

    def apply(self, worker_id: WorkerId, events: BlockEvents) -> bool:
        """Records `events`. False: earlier ones were missed, nothing was recorded, a snapshot is needed."""
        is_new = worker_id not in self._last_sequence
        last_sequence = self._last_sequence.get(worker_id, 0)
        # An equal number is a further part, or a message sent again because its answer was lost: recording it
        # twice is harmless.
        if not events.snapshot and not last_sequence <= events.sequence <= last_sequence + 1:
            return False
        self._last_sequence[worker_id] = events.sequence
        holder = self._holder(worker_id)
        if events.snapshot and not is_new:
            self._table.clear(holder)
        if events.stored:
            tiers = np.frombuffer(events.stored_tiers or bytes(events.num_stored), np.uint8)
            codes = tiers.astype(np.uint64) + np.uint64(_FIRST_CODE)
            self._table.store(holder, digests_of(events.stored), codes)
        if events.removed:
            self._table.remove(holder, digests_of(events.removed))
        return True

    def forget(self, worker_id: WorkerId) -> None:
        self._last_sequence.pop(worker_id, None)
        holder = self._holders.pop(worker_id, None)
        if holder is not None:
            del self._names[holder]
            self._table.clear(holder)

    def overlaps(self, keys: Sequence[BlockKey]) -> dict[WorkerId, Overlap]:
        """Who holds how many of `keys`, from the first on; those who lack the first are left out."""
        return dict(self._overlaps(keys)) if keys and not self.is_empty else {}

    def check(self) -> None:
        """Raises AssertionError where the bookkeeping does not hold."""
        assert self._names == {holder: worker_id for worker_id, holder in self._holders.items()}, (
            "holders differ"
        )
        assert self._holders.keys() == self._last_sequence.keys(), (
            "a holder without a sequence, or one without a holder"
        )
        self._table.check()

    def _overlaps(self, keys: Sequence[BlockKey]) -> Iterator[tuple[WorkerId, Overlap]]:
        for holder, counts in self._table.leading(digests_of(b"".join(keys))).items():
            yield (
                self._names[holder],
                Overlap(
                    num_device_blocks=counts[_DEVICE_CODE],
                    num_memory_blocks=counts[_MEMORY_CODE],
                    num_disk_blocks=counts[_DISK_CODE],
                ),
            )

    def _holder(self, worker_id: WorkerId) -> int:
        """Its number; those of workers that left are given again, or the table would widen with every restart."""
        holder = self._holders.get(worker_id)
        if holder is None:
            holder = next(number for number in range(len(self._names) + 1) if number not in self._names)
            self._holders[worker_id] = holder
            self._names[holder] = worker_id
        return holder
