"""One append-only file of records.

Buffered I/O, by measurement (256 MiB in files on a virtual NVMe disk with ext4, 2 AMD EPYC cores, MB/s):

    record      write: O_DIRECT  buffered  buffered + fdatasync      read: O_DIRECT  buffered, cold  buffered, cached
    64 KiB             549       3709      1277                            714       2771            18161
    256 KiB            1277      3589      1313                            1665      2671            20554
    1 MiB              1856      3571      1351                            1951      2807            19794
    4 MiB              2033      3134      1294                            2228      2557            20296

One thread at a time waits for every direct request; the kernel's read-ahead and write-back keep several under way.
Nothing is synced: blocks can be computed again, a crash of the process loses none of them, and one of the machine loses
a tail that checksums tell apart. But the kernel is told after every WRITE_BACK_BYTES to write back and to forget what
lies behind: otherwise one GiB wrote at 365 to 1158 MB/s and pushed everything else out of the page cache, with it at
1863 to 2218.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.blocks import BlockKey
from kvstore.errors import DiskFailed
from kvstore.tiers.record import (
    MAGIC,
    RecordHeader,
    first_block_offset,
    pack_record_header,
    told_header_bytes,
    unpack_record_header,
)
from kvstore.tiers.segment_header import SEGMENT_HEADER_BYTES, SegmentFormat, SegmentHeader

WRITE_BACK_BYTES = 8 * 2**20
# Files occupy whole pages of the file system.
FILE_SYSTEM_BLOCK_BYTES = 4096
_SEARCH_BYTES = 2**20
# Headers of up to 18 blocks are read at once; with more, most reads would wait for two pages of the disk.
_SHORT_HEADER_BYTES = 512


def occupied_bytes(size_bytes: int) -> int:
    """What a file of this size takes from the disk."""
    return -(-size_bytes // FILE_SYSTEM_BLOCK_BYTES) * FILE_SYSTEM_BLOCK_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """The headers of whole records, by where their first blocks lie; what was between and behind them was none."""

    records: tuple[tuple[int, RecordHeader], ...]
    num_gaps: int
    tail_bytes: int


class Segment:
    """An open file. One thread appends; any number read. Its owner counts who uses it, and closes it after them,
    and keeps book of what it takes from the disk."""

    def __init__(self, fd: int, *, path: Path, header: SegmentHeader, form: SegmentFormat) -> None:
        self.path = path
        self.number = header.number
        self.seal = header.seal
        self.stored_bytes = form.stored_bytes
        self.size_bytes = os.fstat(fd).st_size
        self.taken_bytes = occupied_bytes(self.size_bytes)
        self.num_users = 0
        self.roots: set[BlockKey] = set()
        self._fd = fd
        self._seed = header.seed
        self._written_back = self.size_bytes

    @property
    def is_removed(self) -> bool:
        """Whether somebody else deleted the file; what it holds can still be read."""
        return os.fstat(self._fd).st_nlink == 0

    @property
    def has_torn_end(self) -> bool:
        """Whether a failed append left something behind."""
        return os.fstat(self._fd).st_size != self.size_bytes

    def size_with(self, num_blocks: int) -> int:
        """The size with one more record."""
        return self._first_block(self.size_bytes, num_blocks) + num_blocks * self.stored_bytes

    def append(self, record: RecordHeader, stored: Sequence[memoryview]) -> int:
        """Writes one record and returns where its first block lies.

        Raises OSError; the file is then as before, or ends in a torn record that nothing refers to.
        """
        first_block = self._first_block(self.size_bytes, len(stored))
        head = pack_record_header(record, seed=self._seed + self.size_bytes)
        head += bytes(first_block - self.size_bytes - len(head))
        try:
            end = self._write_all([memoryview(head), *stored])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size_bytes)
            raise
        self.size_bytes = end
        self.roots.add(record.run.root)
        if end - self._written_back >= WRITE_BACK_BYTES:
            self.write_back()
        return first_block

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        """Fills the buffers from there on. Raises DiskFailed, also if the file ends before."""
        missing = sum(len(buffer) for buffer in into)
        try:
            num_read = os.preadv(self._fd, into, offset)
        except OSError as error:
            raise DiskFailed(f"cannot read {self.path} at {offset}: {error}") from error
        if num_read != missing:
            raise DiskFailed(f"{self.path} has {num_read} bytes at {offset}, must have {missing}")

    def scan(self) -> "Scan":
        """The records of a file that was there; what follows the last one is cut off. Raises OSError."""
        records: list[tuple[int, RecordHeader]] = []
        num_gaps, end = 0, SEGMENT_HEADER_BYTES
        while (found := self._next_record(end)) is not None:
            offset, record = found
            num_gaps += offset > end
            first_block = self._first_block(offset, len(record.run.keys))
            records.append((first_block, record))
            self.roots.add(record.run.root)
            end = first_block + len(record.run.keys) * self.stored_bytes
        tail_bytes = self.size_bytes - end
        if tail_bytes:
            os.ftruncate(self._fd, end)
            self.size_bytes = self._written_back = end
            self.taken_bytes = occupied_bytes(end)
        return Scan(records=tuple(records), num_gaps=num_gaps, tail_bytes=tail_bytes)

    def write_back(self) -> None:
        """Tells the kernel to write what it has of the end, and to forget what lies before."""
        # The first advice on a range starts its write-back, the second drops what is clean by then.
        start = max(0, self._written_back - WRITE_BACK_BYTES)
        os.posix_fadvise(self._fd, start, self.size_bytes - start, os.POSIX_FADV_DONTNEED)
        self._written_back = self.size_bytes

    def close(self) -> None:
        os.close(self._fd)

    def _next_record(self, start: int) -> tuple[int, RecordHeader] | None:
        """The one that is there, or the first behind what is none."""
        while start < self.size_bytes:
            record = self._record_at(start)
            if record is not None:
                return start, record
            data = os.pread(self._fd, _SEARCH_BYTES, start + 1)
            found = data.find(MAGIC)
            start += 1 + (found if found >= 0 else max(len(data) - len(MAGIC) + 1, 0))
        return None

    def _record_at(self, offset: int) -> RecordHeader | None:
        data = os.pread(self._fd, _SHORT_HEADER_BYTES, offset)
        size_bytes = told_header_bytes(data)
        if size_bytes is None:
            return None
        if size_bytes > len(data):
            data += os.pread(self._fd, size_bytes - len(data), offset + len(data))
        record = unpack_record_header(data, seed=self._seed + offset)
        if record is None:
            return None
        num_blocks = len(record.run.keys)
        end = self._first_block(offset, num_blocks) + num_blocks * self.stored_bytes
        return record if end <= self.size_bytes else None

    def _first_block(self, offset: int, num_blocks: int) -> int:
        return first_block_offset(offset, num_blocks=num_blocks, stored_bytes=self.stored_bytes)

    def _write_all(self, buffers: list[memoryview]) -> int:
        end = self.size_bytes
        while buffers:
            num_written = os.pwritev(self._fd, buffers, end)
            end += num_written
            while buffers and num_written >= len(buffers[0]):
                num_written -= len(buffers.pop(0))
            if buffers:  # a disk that is nearly full takes a part, and says why with the next call
                buffers[0] = buffers[0][num_written:]
        return end
