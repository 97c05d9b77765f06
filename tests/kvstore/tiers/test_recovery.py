"""What opening a tier reads."""

import os
from typing import TYPE_CHECKING

import pytest

from kvstore.errors import DiskFailed
from kvstore.tiers.segment import Segment

if TYPE_CHECKING:
    from conftest import Disk

NUM_BLOCKS = 64
CAPACITY_BYTES = 16 * 2**20  # so that one segment has all of them


def test_headers_are_read_at_once_and_blocks_not_at_all(
    disk: "Disk", monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, chain = disk.open(capacity_bytes=CAPACITY_BYTES), disk.chain(NUM_BLOCKS)
    for start in range(NUM_BLOCKS):
        disk.write(tier, chain.part(start, start + 1))
    tier.close()
    (path,) = disk.segments()
    reads: list[tuple[int, int]] = []
    pread = os.pread

    def told(fd: int, num_bytes: int, offset: int) -> bytes:
        reads.append((offset, num_bytes))
        return pread(fd, num_bytes, offset)

    monkeypatch.setattr(os, "pread", told)
    tier = disk.open(capacity_bytes=CAPACITY_BYTES)
    assert tier.stats().num_blocks == NUM_BLOCKS
    assert len(reads) == 2  # whose segment it is, and all headers
    blocks_bytes = NUM_BLOCKS * disk.settings.block_bytes
    assert max(offset + num_bytes for offset, num_bytes in reads) == path.stat().st_size - blocks_bytes


def test_a_segment_goes_on_growing_behind_what_was_found(disk: "Disk") -> None:
    chain = disk.chain(6)
    for start in range(6):
        tier = disk.open(capacity_bytes=CAPACITY_BYTES)
        disk.write(tier, chain.part(start, start + 1))
        tier.close()
    tier = disk.open(capacity_bytes=CAPACITY_BYTES)
    assert len(disk.segments()) == 1
    assert disk.read(tier, chain) == 6


def test_a_segment_that_was_begun_and_not_more_is_none_that_is_damaged(
    disk: "Disk", monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, chain = disk.open(), disk.chain(1)

    def fail(*_arguments: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as killed:
        killed.setattr(Segment, "append", fail)
        with pytest.raises(DiskFailed, match="killed"):
            tier.write(chain.run, list(chain.blocks))
    tier.close()
    (path,) = disk.segments()
    tier = disk.open()
    assert (tier.stats().num_damaged, tier.stats().num_blocks) == (0, 0)
    disk.now_s += 10
    disk.write(tier, chain)
    assert disk.segments() == [path]
    assert disk.read(tier, chain) == 1
