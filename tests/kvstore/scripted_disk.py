"""A disk that does what a test says: waits, fails, lies, hangs; and stores over it."""

import asyncio
import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.blocks import BlockKey, chain_keys, root_key
from kvstore.disk_io import Disk
from kvstore.holdings import Holdings
from kvstore.store import BlockStore, PinnedBlocks, Reservation
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.tier import BlockRun, HeldPrefix, TierStats

BLOCK_BYTES = 64
SOON_S = 5.0


def chain(num_blocks: int, *, number: int = 0, salt: str = "") -> BlockRun:
    root = root_key(model_fingerprint=b"model", cache_salt=salt)
    token_ids = [number * 1000 + block for block in range(num_blocks) for _ in range(16)]
    return BlockRun(root=root, parent=root, first_position=0, keys=tuple(chain_keys(root, token_ids)))


def content(key: BlockKey) -> NDArray[np.uint8]:
    return np.frombuffer(key * (BLOCK_BYTES // len(key)), np.uint8)


class ScriptedDisk:
    """Holds blocks for as long as they are not dropped. Reads and writes wait until `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.failure: Exception | None = None
        self.begun = threading.Semaphore(0)
        self.reads: list[tuple[BlockKey, ...]] = []
        self.writes: list[tuple[BlockKey, ...]] = []
        self.corrupted: set[BlockKey] = set()
        self.num_erased = 0
        self.is_closed = False
        self._blocks: dict[BlockKey, tuple[BlockRun, bytes]] = {}
        self._changes: dict[BlockKey, bool] = {}

    def hold(self, run: BlockRun) -> None:
        for index, key in enumerate(run.keys):
            self._blocks[key] = run.part(index, index + 1), content(key).tobytes()
            self._changes[key] = True

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._blocks

    def run(self, keys: Sequence[BlockKey]) -> BlockRun | None:
        num_held = next((n for n, key in enumerate(keys) if key not in self._blocks), len(keys))
        return self._blocks[keys[0]][0].extended(tuple(keys[1:num_held])) if num_held else None

    def write(self, run: BlockRun, blocks: Sequence[NDArray[np.uint8]]) -> None:
        self.writes.append(run.keys)
        self._wait()
        for key, block in zip(run.keys, blocks, strict=True):
            assert block.tobytes() == content(key).tobytes()
        self.hold(run)

    def read(self, keys: Sequence[BlockKey], into: Sequence[NDArray[np.uint8]]) -> int:
        self.reads.append(tuple(keys))
        self._wait()
        for num_read, (key, block) in enumerate(zip(keys, into, strict=True)):
            if key in self.corrupted or key not in self._blocks:
                return num_read
            block[:] = np.frombuffer(self._blocks[key][1], np.uint8)
        return len(keys)

    def drop(self, root: BlockKey | None) -> int:
        dropped = [key for key, (run, _) in self._blocks.items() if root in (None, run.root)]
        for key in dropped:
            del self._blocks[key]
            self._changes[key] = False
        return len(dropped)

    def erase_dropped(self) -> None:
        self._wait()
        self.num_erased += 1

    def take_changes(self) -> tuple[list[BlockKey], list[BlockKey]]:
        changes, self._changes = self._changes, {}
        return [key for key in changes if changes[key]], [key for key in changes if not changes[key]]

    def stats(self) -> TierStats:
        return TierStats(
            num_blocks=len(self._blocks), capacity_blocks=100, used_bytes=0, capacity_bytes=0,
            num_hit_blocks=0, num_stored_blocks=0, num_evicted_blocks=0, num_errors=0,
        )  # fmt: skip

    def prefixes(self, max_prefixes: int) -> list[HeldPrefix]:
        return []

    def close(self) -> None:
        self.is_closed = True

    def _wait(self) -> None:
        self.begun.release()
        assert self.go.wait(SOON_S)
        if self.failure is not None:
            raise self.failure


def open_store(num_slots: int, *, disk: Disk | None = None, disk_timeout_s: float = SOON_S) -> BlockStore:
    memory = MemoryTier(
        np.zeros(num_slots * BLOCK_BYTES + 3, np.uint8),
        block_bytes=BLOCK_BYTES,
        policy="lru",
        holdings=Holdings(),
    )
    return BlockStore(memory, disk=disk, disk_timeout_s=disk_timeout_s)


def reserve(store: BlockStore, num_blocks: int) -> Reservation:
    reservation = store.reserve(num_blocks)
    assert reservation is not None
    return reservation


def keep(store: BlockStore, run: BlockRun) -> None:
    with reserve(store, len(run.keys)) as reservation:
        for slot, key in zip(reservation.slots, run.keys, strict=True):
            store.arena_SX[slot] = content(key)
        reservation.commit(run, slots=reservation.slots)
    store.check()


def check_content(store: BlockStore, pinned: PinnedBlocks, run: BlockRun) -> None:
    for slot, key in zip(pinned.slots, run.keys, strict=False):
        assert np.array_equal(store.arena_SX[slot], content(key))


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not is_so():  # noqa: ASYNC110  a thread changes it
            await asyncio.sleep(0)


async def begun(disk: ScriptedDisk) -> None:
    """One more read, write or erasure has begun."""
    assert await asyncio.to_thread(disk.begun.acquire, timeout=SOON_S)


def can_reserve(store: BlockStore, num_blocks: int) -> bool:
    reservation = store.reserve(num_blocks)
    if reservation is not None:
        reservation.close()
    return reservation is not None


def nothing_is_held(store: BlockStore) -> None:
    """Every slot can be had: none is pinned, none reserved."""
    store.check()
    assert can_reserve(store, len(store.arena_SX))
