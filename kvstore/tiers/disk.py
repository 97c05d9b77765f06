"""Blocks on disk: append-only segments of bounded size that outlive the process.

Lookups never wait. Reads and writes block and are called in threads: any number of reads, one write at a time. Space
comes back by segments: the one of which the least is still wanted is deleted after its live blocks moved to the
growing one, for which a segment's worth of room is always left. What leaves is the residency's choice.

A disk that fails costs blocks, never requests: a block that cannot be read is forgotten, and after a failed write
nothing is written for a while.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kvstore.blocks import BlockKey
from kvstore.errors import DiskFailed, TierUnusable
from kvstore.tiers.backoff import Backoff
from kvstore.tiers.directory_lock import DirectoryLock
from kvstore.tiers.disk_index import DiskIndex
from kvstore.tiers.disk_settings import DiskSettings
from kvstore.tiers.disk_writer import DiskWriter
from kvstore.tiers.placed import Placed, Record, read_blocks
from kvstore.tiers.record import Block
from kvstore.tiers.recovery import FoundOther, find_segments
from kvstore.tiers.segment import Segment
from kvstore.tiers.segment_files import SegmentFiles
from kvstore.tiers.segment_header import Origin
from kvstore.tiers.tier import BlockRun, HeldPrefix, TierStats

# A lock is taken by whoever runs, not by whoever waits: those get their turn while the others sleep.
PAUSE_BETWEEN_PARTS_S = 0.5e-3

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskStats(TierStats):
    """`num_foreign` (with those in the clear that should not be), `num_other_version` and `num_damaged` count
    segments found when the tier was opened."""

    num_foreign: int
    num_other_version: int
    num_damaged: int
    num_corrupted_blocks: int
    num_moved_blocks: int
    is_paused: bool


class DiskTier:
    def __init__(
        self, directory: Path, *, settings: DiskSettings, lock: DirectoryLock, now_s: Callable[[], float]
    ) -> None:
        self._directory = directory
        self._settings = settings
        self._block_bytes = settings.block_bytes
        self._now_s = now_s
        self._changing = threading.Lock()  # guards the index; never held while waiting for the disk
        self._writing = threading.Lock()
        self._index = DiskIndex(settings.num_slots, policy=settings.policy)
        self._files = SegmentFiles(directory, settings=settings, lock=lock)
        self._writer = DiskWriter(
            index=self._index, files=self._files, settings=settings, changing=self._changing
        )
        self._backoff = Backoff()
        self._to_erase: set[Segment] = set()
        self._erases_others = False
        self._num_found = dict.fromkeys(Origin, 0)
        self._num_hit = 0
        self._num_errors = 0
        self._num_corrupted = 0

    @classmethod
    def open(cls, directory: Path, *, settings: DiskSettings, now_s: Callable[[], float] = time.time) -> Self:
        """With all blocks found there. `now_s` is a wall clock: uses are dated across restarts.

        Raises TierUnusable: no such directory, another process has it, or its blocks have another key.
        """
        lock = DirectoryLock(directory)
        tier = cls(directory, settings=settings, lock=lock, now_s=now_s)
        try:
            tier._recover()
        except BaseException:
            tier.close()
            raise
        return tier

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._index

    def longest_prefix(self, keys: Sequence[BlockKey]) -> int:
        """How many blocks from the first key on are held."""
        return self._index.longest_prefix(keys)

    def run(self, keys: Sequence[BlockKey]) -> BlockRun | None:
        """The leading ones of these consecutive blocks that are held, with their place in the chain."""
        with self._changing:
            return self._index.run(keys)

    def write(self, run: BlockRun, blocks: Sequence[Block]) -> None:
        """Appends those blocks of the run (block_bytes each) that are not held. Raises DiskFailed: not all of them
        are held now; while the tier pauses after a failure, that comes without touching the disk."""
        if len(blocks) != len(run.keys):
            raise ValueError(f"a run of {len(run.keys)} blocks comes with as many, got {len(blocks)}")
        self._check(blocks)
        with self._write_access():
            self._writer.write(run, blocks, now_s=self._now_s())

    def read(self, keys: Sequence[BlockKey], into: Sequence[Block]) -> int:
        """How many leading blocks are held and were read, each to the buffer (block_bytes) of its place.

        The next one, if it cannot be read or is not what was written, is forgotten, and so is all else of the same
        read that is not what was written.
        """
        self._check(into)
        with self._changing:
            placed = self._index.use(keys[: len(into)], now_s=self._now_s())
            segments = {block.segment for block in placed}
            if not self._files.use(segments):
                return 0
        try:
            found = read_blocks(placed, into[: len(placed)])
        finally:
            self._files.release(segments)
        with self._changing:
            self._num_hit += found.num_blocks
        if found.failure is not None:
            self._lose(found.lost, found.failure)
        return found.num_blocks

    def drop(self, root: BlockKey | None) -> int:
        """Forgets all blocks of a root, or just all. Their bytes are erased by `erase_dropped`; with those of all also
        what is not ours.

        It takes microseconds a block, in parts: others get at the index, and at the interpreter, between them.
        """
        parts = self._index.drop_in_parts(root)
        num_dropped = 0
        while True:
            with self._changing:
                num_blocks = next(parts, None)
                if num_blocks is None:
                    # Also those where its blocks are dead: the next start would find them. Last, as blocks may have
                    # moved to other segments meanwhile.
                    self._to_erase.update(self._files.segments_of(root))
                    self._erases_others |= root is None
                    return num_dropped
            num_dropped += num_blocks
            if num_blocks:
                time.sleep(PAUSE_BETWEEN_PARTS_S)

    def erase_dropped(self) -> None:
        """Takes from the disk what `drop` forgot; the next write does it otherwise. Raises DiskFailed."""
        with self._write_access():
            pass

    def take_changes(self) -> tuple[list[BlockKey], list[BlockKey]]:
        """(stored, removed) since the last call. The first one has all that was found on disk."""
        with self._changing:
            return self._index.take_changes()

    def prefixes(self, max_prefixes: int) -> list[HeldPrefix]:
        with self._changing:
            return self._index.prefixes(max_prefixes, now_s=self._now_s())

    def stats(self) -> DiskStats:
        return DiskStats(
            num_blocks=len(self._index),
            capacity_blocks=self._index.num_slots,
            used_bytes=self._files.used_bytes,
            capacity_bytes=self._settings.capacity_bytes,
            num_hit_blocks=self._num_hit,
            num_stored_blocks=self._writer.num_stored,
            num_evicted_blocks=self._index.num_evicted,
            num_errors=self._num_errors,
            num_foreign=self._num_found[Origin.FOREIGN] + self._num_found[Origin.UNSEALED],
            num_other_version=self._num_found[Origin.OTHER_VERSION],
            num_damaged=self._num_found[Origin.CORRUPTED],
            num_corrupted_blocks=self._num_corrupted + self._writer.num_lost,
            num_moved_blocks=self._writer.num_moved,
            is_paused=self._backoff.pause_left_s(now_s=self._now_s()) > 0,
        )

    def check(self) -> None:
        """That the books agree, and the capacity is kept."""
        with self._changing:
            self._index.check()
        assert self._files.used_bytes <= self._settings.capacity_bytes, "more is used than there is"

    def close(self) -> None:
        """Idempotent, and waits for nobody: what is being read or written now is closed by its last user."""
        self._files.close()

    def _recover(self) -> None:
        records: list[Record] = []
        for found in find_segments(self._directory, self._settings):
            self._files.add_found(found)
            if isinstance(found, FoundOther):
                self._num_found[found.origin] += 1
                logger.warning("%s is %s: its space is taken first", found.path, found.origin.value)
                continue
            if found.scan.num_gaps or found.scan.tail_bytes:
                self._num_found[Origin.CORRUPTED] += 1
                logger.warning(
                    "%s is damaged: %d gaps, and %d bytes behind its last record",
                    found.segment.path, found.scan.num_gaps, found.scan.tail_bytes,
                )  # fmt: skip
            records += (Record(found.segment, header) for header in found.scan.headers)
        # The least recently used first, as if it all happened again; of one moment, parents before children.
        records.sort(key=lambda record: (record.header.used_s, record.header.run.first_position))
        with self._changing:
            now_s = self._now_s()
            for record in records:
                # A clock that was ahead once must not keep what it dated.
                self._index.restore(record, used_s=min(record.header.used_s, now_s))
            self._index.begin()
        if self._settings.key is not None:
            self._remove_clear()
        with contextlib.suppress(DiskFailed), self._write_access():
            self._writer.make_room(0)

    def _remove_clear(self) -> None:
        """What was written before a key was given must not stay in the clear. Raises TierUnusable if it does."""
        try:
            num_removed = self._files.remove_others(
                [origin for origin in Origin if origin is not Origin.FOREIGN]
            )
            if num_removed:
                logger.warning("removed %d files that are or may be not encrypted", num_removed)
        except OSError as error:
            raise TierUnusable(
                f"cannot remove what is not encrypted in {self._directory}: {error}"
            ) from error

    @contextlib.contextmanager
    def _write_access(self) -> Iterator[None]:
        with self._writing:
            pause_s = self._backoff.pause_left_s(now_s=self._now_s())
            if pause_s:
                raise DiskFailed(f"{self._directory} failed: it is not written for another {pause_s:.1f} s")
            try:
                with self._files.writing():
                    self._erase()
                    yield
            except (OSError, DiskFailed, TierUnusable) as error:
                self._backoff.failed(now_s=self._now_s())
                self._count_error()
                raise DiskFailed(f"cannot write to {self._directory}: {error}") from error
            self._backoff.succeeded()

    def _erase(self) -> None:
        if not (self._to_erase or self._erases_others):
            return
        with self._changing:
            segments, erases_others = set(self._to_erase), self._erases_others
        if segments:
            self._writer.erase(segments)
            with self._changing:
                self._to_erase -= segments
        if erases_others:
            try:
                self._files.remove_others()
            except OSError as error:
                logger.warning("what is not ours in %s stays there: %s", self._directory, error)
            with self._changing:
                self._erases_others = False

    def _lose(self, blocks: Sequence[Placed], failure: DiskFailed) -> None:
        logger.warning("blocks on disk that are lost: %d; the first one: %s", len(blocks), failure)
        with self._changing:
            self._num_corrupted += self._index.forget(blocks)
            self._num_errors += len(blocks)

    def _count_error(self) -> None:
        with self._changing:
            self._num_errors += 1

    def _check(self, blocks: Sequence[Block]) -> None:
        shape = (self._block_bytes,)
        for block in blocks:
            if block.shape != shape or block.strides != (1,):
                raise ValueError(
                    f"a block is one row of {self._block_bytes} bytes, one behind the other, got {block.shape} of"
                    f" {block.dtype}, {block.strides} bytes apart"
                )
