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
    MAX_RECORD_BLOCKS,
    Block,
    RecordHeader,
    header_bytes,
    pack_record_header,
    unpack_record_header,
)
from kvstore.tiers.segment_header import SEGMENT_HEADER_BYTES, SegmentHeader
from kvstore.tiers.segment_layout import SegmentLayout, occupied_bytes

WRITE_BACK_BYTES = 8 * 2**20
_MAX_HEADER_BYTES = header_bytes(MAX_RECORD_BLOCKS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """The headers of whole records. Between them, and behind them or their blocks, was something else."""

    headers: tuple[RecordHeader, ...]
    num_gaps: int
    tail_bytes: int


class Segment:
    """An open file. One thread appends; any number read. Its owner counts who uses it, and closes it after them,
    and keeps book of what it takes from the disk."""

    def __init__(self, fd: int, *, path: Path, header: SegmentHeader, layout: SegmentLayout) -> None:
        self.path = path
        self.number = header.number
        self.seal = header.seal
        self.stored_bytes = layout.stored_bytes
        self.size_bytes = os.fstat(fd).st_size
        self.taken_bytes = occupied_bytes(self.size_bytes)
        self.num_users = 0
        self.roots: set[BlockKey] = set()
        self._fd = fd
        self._layout = layout
        self._seed = header.seed
        self._headers_end = SEGMENT_HEADER_BYTES
        self._blocks_start = header.blocks_start
        self._written_back = self.size_bytes

    @property
    def is_removed(self) -> bool:
        """Whether somebody else deleted the file; what it holds can still be read."""
        return os.fstat(self._fd).st_nlink == 0

    @property
    def has_torn_end(self) -> bool:
        """Whether a failed append left something behind."""
        return os.fstat(self._fd).st_size != self.size_bytes

    @property
    def blocks_bytes(self) -> int:
        """What there is of blocks."""
        return self.size_bytes - self._blocks_start

    def next_block(self, num_blocks: int) -> int:
        """Where the blocks of the next record will lie, if it has so many."""
        return self._layout.record_start(self.size_bytes, num_blocks)

    def size_with(self, num_blocks: int) -> int:
        """The size with one more record."""
        return self.next_block(num_blocks) + num_blocks * self.stored_bytes

    def has_place(self, num_blocks: int) -> bool:
        """Whether one more record fits, as far as segments grow."""
        return (
            self.size_with(num_blocks) <= self._layout.segment_bytes
            and self._headers_end + header_bytes(num_blocks) <= self._blocks_start
        )

    def append(self, header: RecordHeader, stored: Sequence[Block]) -> None:
        """Writes one record, whose blocks lie at `next_block`.

        Raises OSError; the file is then as before, or ends in torn blocks that nothing refers to.
        """
        head = pack_record_header(header, seed=self._seed + self._headers_end)
        try:
            end = self._write_all(list(stored), header.first_block)
            headers_end = self._write_all([head], self._headers_end)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size_bytes)
                # The next header may be shorter than what there is of this one.
                os.pwrite(self._fd, bytes(len(head)), self._headers_end)
            raise
        self.size_bytes, self._headers_end = end, headers_end
        self.roots.add(header.run.root)
        if end - self._written_back >= WRITE_BACK_BYTES:
            self._write_back()

    def read(self, offset: int, into: Sequence[Block]) -> None:
        """Fills the buffers from there on. Raises DiskFailed, also if the file ends before."""
        missing = sum(len(buffer) for buffer in into)
        try:
            num_read = os.preadv(self._fd, into, offset)  # type: ignore[arg-type]  # arrays are buffers
        except OSError as error:
            raise DiskFailed(f"cannot read {self.path} at {offset}: {error}") from error
        if num_read != missing:
            raise DiskFailed(f"{self.path} has {num_read} bytes at {offset}, must have {missing}")

    def scan(self) -> Scan:
        """The records of a file that was there; what follows the last one is erased. Raises OSError."""
        data = os.pread(self._fd, min(self._blocks_start, self.size_bytes), 0)
        headers: list[RecordHeader] = []
        num_gaps, headers_end, end = 0, SEGMENT_HEADER_BYTES, self._blocks_start
        while (found := self._next_record(data, headers_end)) is not None:
            offset, header = found
            num_gaps += offset > headers_end
            headers.append(header)
            self.roots.add(header.run.root)
            headers_end = offset + header_bytes(len(header.run.keys))
            end = max(end, self._end_of(header))
        torn = data[headers_end:].rstrip(b"\0")
        tail_bytes = len(torn) + max(0, self.size_bytes - end)
        # A whole header of blocks that are not there must not come back to life as others take their place.
        if torn:
            os.pwrite(self._fd, bytes(len(torn)), headers_end)
        if self.size_bytes != end:
            os.ftruncate(self._fd, end)
        self.size_bytes = self._written_back = end
        self.taken_bytes = occupied_bytes(end)
        self._headers_end = headers_end
        return Scan(headers=tuple(headers), num_gaps=num_gaps, tail_bytes=tail_bytes)

    def finish(self) -> None:
        """Nothing more will be appended."""
        self._write_back()
        # Not before: a page of headers that is forgotten too soon is read again to be added to.
        os.posix_fadvise(self._fd, 0, self._blocks_start, os.POSIX_FADV_DONTNEED)

    def _write_back(self) -> None:
        """Tells the kernel to write what it has of the end, and to forget what lies before."""
        # The first advice on a range starts its write-back, the second drops what is clean by then.
        start = max(self._blocks_start, self._written_back - WRITE_BACK_BYTES)
        os.posix_fadvise(self._fd, start, self.size_bytes - start, os.POSIX_FADV_DONTNEED)
        self._written_back = self.size_bytes

    def close(self) -> None:
        os.close(self._fd)

    def _next_record(self, data: bytes, start: int) -> tuple[int, RecordHeader] | None:
        """The one whose header is there, or the first behind what is none; and where its header is."""
        while (start := data.find(MAGIC, start)) >= 0:
            header = unpack_record_header(data[start : start + _MAX_HEADER_BYTES], seed=self._seed + start)
            if header is not None and self._end_of(header) <= self.size_bytes:
                return start, header
            start += 1
        return None

    def _end_of(self, header: RecordHeader) -> int:
        """Of the blocks that it is about."""
        return header.first_block + len(header.run.keys) * self.stored_bytes

    def _write_all(self, buffers: list[Block | bytes], offset: int) -> int:
        """Returns where they end."""
        end = offset + sum(map(len, buffers))
        while True:
            num_written = os.pwritev(self._fd, buffers, offset)  # type: ignore[arg-type]  # arrays are buffers
            offset += num_written
            if offset == end:
                return end
            # A disk that is nearly full takes a part, and says why with the next call.
            while num_written >= len(buffers[0]):
                num_written -= len(buffers.pop(0))
            buffers[0] = buffers[0][num_written:]
