"""What the files of a directory hold, found out when a tier is opened: only headers are read."""

import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kvstore.errors import TierUnusable
from kvstore.tiers.disk_settings import DiskSettings
from kvstore.tiers.segment import Scan, Segment
from kvstore.tiers.segment_header import (
    SEGMENT_HEADER_BYTES,
    Origin,
    SegmentHeader,
    read_segment_header,
)
from kvstore.tiers.segment_layout import occupied_bytes

# Each reads its own segment: a disk serves many at a time.
NUM_THREADS = 8

_NAME = re.compile(r"segment-([0-9a-f]{16})\.kv")

logger = logging.getLogger(__name__)


def segment_path(directory: Path, number: int) -> Path:
    return directory / f"segment-{number:016x}.kv"


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundSegment:
    segment: Segment
    scan: Scan


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundOther:
    """Not ours, or nobody's: only its space is of interest."""

    path: Path
    number: int
    size_bytes: int
    origin: Origin


def find_segments(directory: Path, settings: DiskSettings) -> Iterator[FoundSegment | FoundOther]:
    """In the order of their numbers. Raises TierUnusable for a wrong key, and then leaves nothing open."""
    numbers = sorted(
        int(match[1], 16) for name in os.listdir(directory) if (match := _NAME.fullmatch(name))
    )  # fmt: skip
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        found = [threads.submit(_inspect, directory, number, settings) for number in numbers]
    failures = [failure for future in found if (failure := future.exception())]
    if failures:
        for future in found:
            if future.exception() is None and isinstance(other := future.result(), FoundSegment):
                other.segment.close()
        raise failures[0]
    return (future.result() for future in found)


def _inspect(directory: Path, number: int, settings: DiskSettings) -> FoundSegment | FoundOther:
    path = segment_path(directory, number)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise TierUnusable(f"cannot open {path}: {error}") from error
    try:
        found = _inspect_open(fd, path, number, settings)
    except BaseException:
        os.close(fd)
        raise
    if isinstance(found, FoundOther):
        os.close(fd)
    return found


def _inspect_open(fd: int, path: Path, number: int, settings: DiskSettings) -> FoundSegment | FoundOther:
    size_bytes = os.fstat(fd).st_size
    try:
        header = _read_header(fd, path, settings)
        if not isinstance(header, Origin) and header.number == number:
            segment = Segment(fd, path=path, header=header, layout=settings.layout)
            return FoundSegment(segment=segment, scan=segment.scan())
        origin = header if isinstance(header, Origin) else Origin.CORRUPTED
    except OSError as error:
        logger.error("cannot read %s: %s", path, error)
        origin = Origin.CORRUPTED
    return FoundOther(path=path, number=number, size_bytes=occupied_bytes(size_bytes), origin=origin)


def _read_header(fd: int, path: Path, settings: DiskSettings) -> SegmentHeader | Origin:
    try:
        return read_segment_header(os.pread(fd, SEGMENT_HEADER_BYTES, 0), settings.form)
    except TierUnusable as error:
        raise TierUnusable(
            f"{error}: give it the key that they were written with, or remove {path.parent}"
        ) from error
