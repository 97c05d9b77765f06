"""Which worker holds which blocks: hints for routing, bounded in size, wrong at worst for a moment."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from control_plane.directory.member import WorkerId
from kvstore.blocks import BlockKey


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockEvents:
    """What became cached and what was evicted since the last acknowledged events; see directory.proto."""

    sequence: int
    snapshot: bool = False
    stored: tuple[BlockKey, ...] = ()
    removed: tuple[BlockKey, ...] = ()


class _Holdings:
    """The blocks of one worker, least recently announced first, each with the stamp of its announcement."""

    __slots__ = ("last_sequence", "stamps")

    def __init__(self) -> None:
        self.last_sequence = 0
        self.stamps: OrderedDict[BlockKey, int] = OrderedDict()


class BlockIndex:
    """Mutated by `apply` and `forget` alone. Forgets the least recently announced when it is full."""

    def __init__(self, *, max_blocks_per_worker: int, max_blocks: int) -> None:
        if not 0 < max_blocks_per_worker <= max_blocks:
            raise ValueError(
                f"need 0 < max_blocks_per_worker <= max_blocks, got {max_blocks_per_worker} and {max_blocks}"
            )
        self._max_blocks_per_worker = max_blocks_per_worker
        self._max_blocks = max_blocks
        self._holdings: dict[WorkerId, _Holdings] = {}
        self._num_blocks = 0
        self._clock = 0

    def __len__(self) -> int:
        return self._num_blocks

    def apply(self, worker_id: WorkerId, events: BlockEvents) -> bool:
        """Records `events`. False: earlier ones were missed, nothing was recorded, a snapshot is needed."""
        holdings = self._holdings.setdefault(worker_id, _Holdings())
        if events.snapshot:
            self._num_blocks -= len(holdings.stamps)
            holdings.stamps.clear()
        elif not holdings.last_sequence <= events.sequence <= holdings.last_sequence + 1:
            return False
        # An equal number is a message sent again because its answer was lost; recording it twice is harmless.
        holdings.last_sequence = events.sequence
        self._store(holdings, events.stored)
        self._remove(holdings, events.removed)
        return True

    def forget(self, worker_id: WorkerId) -> None:
        holdings = self._holdings.pop(worker_id, None)
        if holdings is not None:
            self._num_blocks -= len(holdings.stamps)

    def num_leading_blocks(self, worker_id: WorkerId, keys: Sequence[BlockKey]) -> int:
        """How many of `keys`, from the first on, the worker holds without a hole."""
        holdings = self._holdings.get(worker_id)
        if holdings is None:
            return 0
        stamps = holdings.stamps
        for number, key in enumerate(keys):
            if key not in stamps:
                return number
        return len(keys)

    def check(self) -> None:
        """Raises AssertionError where the bounds or the bookkeeping do not hold."""
        sizes = [len(holdings.stamps) for holdings in self._holdings.values()]
        assert sum(sizes) == self._num_blocks, f"{self._num_blocks} blocks counted, {sum(sizes)} held"
        assert self._num_blocks <= self._max_blocks, f"{self._num_blocks} blocks exceed {self._max_blocks}"
        assert max(sizes, default=0) <= self._max_blocks_per_worker, f"a worker has {max(sizes)} blocks"
        for worker_id, holdings in self._holdings.items():
            stamps = list(holdings.stamps.values())
            assert stamps == sorted(stamps), f"blocks of {worker_id} are out of order"

    def _store(self, holdings: _Holdings, keys: Iterable[BlockKey]) -> None:
        stamps = holdings.stamps
        for key in keys:
            self._clock += 1
            if key in stamps:
                stamps.move_to_end(key)
            else:
                self._num_blocks += 1
            stamps[key] = self._clock
            if len(stamps) > self._max_blocks_per_worker:
                self._drop_oldest(holdings)
            elif self._num_blocks > self._max_blocks:
                self._drop_oldest(self._holder_of_oldest())

    def _remove(self, holdings: _Holdings, keys: Iterable[BlockKey]) -> None:
        for key in keys:
            if holdings.stamps.pop(key, None) is not None:
                self._num_blocks -= 1

    def _drop_oldest(self, holdings: _Holdings) -> None:
        holdings.stamps.popitem(last=False)
        self._num_blocks -= 1

    def _holder_of_oldest(self) -> _Holdings:
        holders = (holdings for holdings in self._holdings.values() if holdings.stamps)
        return min(holders, key=lambda holdings: next(iter(holdings.stamps.values())))
