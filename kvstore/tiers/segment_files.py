"""The files of one directory: who uses them, what they take from the disk, and which one grows."""

import contextlib
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from kvstore.blocks import BlockKey
from kvstore.errors import DiskFailed
from kvstore.tiers.directory_lock import FILE_MODE, DirectoryLock
from kvstore.tiers.disk_settings import DiskSettings
from kvstore.tiers.record import Block, RecordHeader
from kvstore.tiers.recovery import FoundOther, FoundSegment, segment_path
from kvstore.tiers.segment import Segment
from kvstore.tiers.segment_header import Origin, new_segment_header
from kvstore.tiers.segment_layout import occupied_bytes


class SegmentFiles:
    """One thread appends. Segments are used, released and retired by any; the last user closes a retired one."""

    def __init__(self, directory: Path, *, settings: DiskSettings, lock: DirectoryLock) -> None:
        self.capacity_bytes = settings.capacity_bytes
        self.used_bytes = occupied_bytes(1)  # the lock file
        self.segments: list[Segment] = []
        self._directory = directory
        self._form = settings.form
        self._layout = settings.layout
        self._directory_lock = lock
        self._retired: list[Segment] = []
        self._others: list[FoundOther] = []
        self._growing: Segment | None = None
        self._last_number = 0
        self._num_closing = 0
        self._is_written = False
        self._is_closed = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    def add_found(self, found: FoundSegment | FoundOther) -> None:
        if isinstance(found, FoundOther):
            self._others.append(found)
            self._last_number = max(self._last_number, found.number)
            self.used_bytes += found.size_bytes
        else:
            self._add(found.segment)
            # What is not full goes on growing: otherwise every start would leave one more small file.
            self._growing = found.segment if found.segment.has_place(1) else None

    def use(self, segments: Collection[Segment]) -> bool:
        """They stay open until they are released; False, and they are not used, if all is closed."""
        with self._lock:
            if self._is_closed:
                return False
            for segment in segments:
                segment.num_users += 1
            return True

    def release(self, segments: Collection[Segment]) -> None:
        with self._lock:
            for segment in segments:
                segment.num_users -= 1
        self._close_idle()

    def growth(self, num_blocks: int) -> int:
        """What one more record takes from the disk, in a new file if need be."""
        segment = self._growing
        if segment is None or not segment.has_place(num_blocks):
            return occupied_bytes(self._layout.blocks_start + self._layout.max_record_bytes(num_blocks))
        return self._growth_of(segment, num_blocks)

    def has_room(self, num_bytes: int) -> bool:
        return self.used_bytes + num_bytes <= self.capacity_bytes

    def full_segments(self) -> list[Segment]:
        """All but the one that grows."""
        return [segment for segment in self.segments if segment is not self._growing]

    def segments_of(self, root: BlockKey | None) -> list[Segment]:
        """Those that have bytes of a root, or just all."""
        with self._lock:
            return [segment for segment in self.segments if root is None or root in segment.roots]

    def stop_growing(self) -> None:
        """The next record begins a new segment. Raises OSError."""
        segment, self._growing = self._growing, None
        if segment is not None:
            segment.finish()

    def growing(self, num_blocks: int) -> Segment:
        """The segment that takes a record of so many blocks next. Raises OSError, TierUnusable or DiskFailed."""
        segment = self._growing
        if segment is not None:
            if segment.has_place(num_blocks) and not segment.is_removed:
                return segment
            self.stop_growing()
        self._growing = segment = self._create()
        return segment

    def append(self, segment: Segment, header: RecordHeader, stored: Sequence[Block]) -> None:
        """Raises OSError, or DiskFailed where it does not fit."""
        growth = self._growth_of(segment, len(stored))
        self._require_room(growth)
        with self._lock:
            segment.taken_bytes += growth
            self.used_bytes += growth
        try:
            segment.append(header, stored)
        except OSError:
            if segment.has_torn_end:
                with contextlib.suppress(OSError):
                    self.stop_growing()
            else:
                with self._lock:
                    segment.taken_bytes -= growth
                    self.used_bytes -= growth
            raise

    def retire(self, segment: Segment) -> None:
        """Deletes a file, which is closed once nobody uses it. Raises OSError; nothing has changed then."""
        if not segment.is_removed:
            segment.path.unlink()
        with self._lock:
            self.segments.remove(segment)
            self._retired.append(segment)
        self._close_idle()

    def remove_other(self) -> bool:
        """Deletes one file that is not ours; False if there is none. Raises OSError."""
        if not self._others:
            return False
        self._remove(self._others[-1])
        return True

    def remove_others(self, origins: Collection[Origin] = tuple(Origin)) -> int:
        """Deletes the files that are not ours, or some of them; how many. Raises OSError."""
        removed = [other for other in self._others if other.origin in origins]
        for other in removed:
            self._remove(other)
        return len(removed)

    def wait_for_users(self, timeout_s: float) -> None:
        """Until what was retired has given its space back."""
        with self._lock:
            self._changed.wait_for(lambda: not (self._retired or self._num_closing), timeout_s)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Nothing but what is retired closes meanwhile. Raises DiskFailed if all is closed."""
        with self._lock:
            if self._is_closed:
                raise DiskFailed(f"the disk tier in {self._directory} is closed")
            self._is_written = True
        try:
            yield
        finally:
            with self._lock:
                self._is_written = False
            self._close_idle()

    def close(self) -> None:
        """Idempotent. What is used now is closed by its last user, who gives up the lock too."""
        with self._lock:
            self._is_closed = True
        self._close_idle()

    def _create(self) -> Segment:
        self._directory_lock.renew()
        number = self._last_number + 1
        path = segment_path(self._directory, number)
        blocks_start = self._layout.blocks_start
        data, header = new_segment_header(number, self._form, blocks_start=blocks_start)
        self._require_room(blocks_start)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            if os.pwrite(fd, data, 0) != len(data):
                raise DiskFailed(f"{path} has no room for its header")
            os.ftruncate(fd, blocks_start)
            segment = Segment(fd, path=path, header=header, layout=self._layout)
            self._add(segment)
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return segment

    def _add(self, segment: Segment) -> None:
        with self._lock:
            self.segments.append(segment)
            self.used_bytes += segment.taken_bytes
        self._last_number = max(self._last_number, segment.number)

    def _remove(self, other: FoundOther) -> None:
        other.path.unlink(missing_ok=True)
        with self._lock:
            self._others.remove(other)
            self.used_bytes -= other.size_bytes

    def _growth_of(self, segment: Segment, num_blocks: int) -> int:
        return max(0, occupied_bytes(segment.size_with(num_blocks)) - segment.taken_bytes)

    def _require_room(self, num_bytes: int) -> None:
        if not self.has_room(num_bytes):
            raise DiskFailed(
                f"no room in {self._directory}: {self.used_bytes} of {self.capacity_bytes} bytes are used,"
                f" {num_bytes} more are needed"
            )

    def _close_idle(self) -> None:
        # Seen without the lock, as mostly there is nothing: what changes after this looks for itself.
        if not (self._is_closed or self._retired):
            return
        with self._lock:
            if self._is_closed and not self._is_written:
                self._retired += self.segments
                self.segments = []
            idle = [segment for segment in self._retired if not segment.num_users]
            self._retired = [segment for segment in self._retired if segment.num_users]
            self._num_closing += len(idle)
        for segment in idle:
            segment.close()  # frees the space of a deleted file, which takes milliseconds
        with self._lock:
            self._num_closing -= len(idle)
            self.used_bytes -= sum(segment.taken_bytes for segment in idle)
            if self._is_closed and not (self.segments or self._retired or self._num_closing):
                self._directory_lock.close()
            self._changed.notify_all()
