"""What opening a tier reads, and what it leaves in the page cache."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Disk

PAGE_BYTES = 4096
NUM_BLOCKS = 64
CAPACITY_BYTES = 16 * 2**20  # so that one segment has all of them


def test_what_was_not_in_the_page_cache_is_not_there_afterwards(disk: "Disk") -> None:
    path = written(disk)
    forget_cached(path)
    if cached_pages(path):
        pytest.skip("this file system keeps all that is written in memory")
    forget_cached(path)  # to ask for a page brings it
    assert disk.open(capacity_bytes=CAPACITY_BYTES).stats().num_blocks == NUM_BLOCKS
    # Of one page for every block; one that a processor has in hand at that moment the system keeps.
    assert len(cached_pages(path)) <= 1


def test_what_was_in_the_page_cache_stays_there(disk: "Disk") -> None:
    path = written(disk)
    path.read_bytes()
    before = cached_pages(path)
    disk.open(capacity_bytes=CAPACITY_BYTES)
    assert cached_pages(path) == before


def written(disk: "Disk") -> Path:
    """One segment, of a record for each block."""
    tier, chain = disk.open(capacity_bytes=CAPACITY_BYTES), disk.chain(NUM_BLOCKS)
    for start in range(NUM_BLOCKS):
        disk.write(tier, chain.part(start, start + 1))
    tier.close()
    (path,) = disk.directory.glob("segment-*")
    return path


def forget_cached(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_pages(path: Path) -> list[int]:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return [page for page in range(path.stat().st_size // PAGE_BYTES) if is_cached(file.fileno(), page)]


def is_cached(fd: int, page: int) -> bool:
    try:
        return os.preadv(fd, [bytearray(1)], page * PAGE_BYTES, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
