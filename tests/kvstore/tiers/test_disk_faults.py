"""The disk tier on a disk that is full, read-only, gone, slow or fails."""

import contextlib
import errno
import itertools
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvstore.blocks import root_key
from kvstore.errors import DiskFailed, TierUnusable
from kvstore.tiers.disk import DiskTier

if TYPE_CHECKING:
    from conftest import Disk


SOON_S = 5.0


@contextlib.contextmanager
def limited(kind: int, most: int) -> Iterator[None]:
    """The process may use so much of a resource."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextlib.contextmanager
def mounted(directory: Path, *arguments: str) -> Iterator[None]:
    """Something is mounted there. Skips where the system allows no mount."""
    command = ["mount", *arguments, str(directory)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"nothing can be mounted here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fails_then_pauses(disk: "Disk", tier: DiskTier) -> None:
    """A write fails, the next ones do without trying, and what was there is served."""
    num_errors = tier.stats().num_errors
    chain = disk.chain(6)
    with pytest.raises(DiskFailed, match="cannot write"):
        tier.write(chain.run, list(chain.blocks))
    assert tier.stats().num_errors == num_errors + 1
    assert tier.stats().is_paused
    with pytest.raises(DiskFailed, match="not written for another"):
        tier.write(chain.run, list(chain.blocks))
    assert tier.stats().num_errors == num_errors + 1
    tier.check()


def test_a_full_disk_stops_writes_until_it_has_room(disk: "Disk") -> None:
    disk.directory.mkdir()
    with mounted(disk.directory, "-t", "tmpfs", "-o", "size=40k", "tmpfs"):
        tier, chain = disk.open(), disk.chain(3)
        disk.write(tier, chain)
        ballast = disk.directory / "ballast"
        ballast.write_bytes(bytes(16 * 1024))
        fails_then_pauses(disk, tier)
        assert disk.read(tier, chain) == 3
        ballast.unlink()
        disk.now_s += 2
        disk.write(tier, disk.chain(1))
        assert not tier.stats().is_paused
        tier.close()


def test_a_write_that_ends_in_the_middle_leaves_nothing_behind(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(3)
    disk.write(tier, chain.part(0, 1))
    (path,) = disk.segments()
    size_bytes = path.stat().st_size
    with limited(resource.RLIMIT_FSIZE, size_bytes + 2000):  # what exceeds it fails like a full disk
        fails_then_pauses(disk, tier)
    assert path.stat().st_size == size_bytes
    disk.now_s += 2
    disk.write(tier, chain)
    assert disk.read(tier, chain) == 3
    tier.close()
    assert disk.open().stats().num_damaged == 0


def test_a_disk_that_becomes_read_only_is_still_read(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(3)
    disk.write(tier, chain)
    with mounted(disk.directory, "--bind", "-o", "ro", str(disk.directory)):
        fails_then_pauses(disk, tier)
        assert disk.read(tier, chain) == 3
    disk.now_s += 2
    disk.write(tier, disk.chain(3))
    assert not tier.stats().is_paused


def test_a_disk_that_is_read_only_from_the_start_is_refused(disk: "Disk") -> None:
    disk.directory.mkdir()
    with (
        mounted(disk.directory, "--bind", "-o", "ro", str(disk.directory)),
        pytest.raises(TierUnusable, match="Read-only file system"),
    ):
        disk.open()


def test_a_directory_that_is_removed_is_made_again(disk: "Disk") -> None:
    tier, before, after = disk.open(), disk.chain(4), disk.chain(4)
    disk.write(tier, before)
    shutil.rmtree(disk.directory)
    assert disk.read(tier, before) == 4
    tier.write(after.run, list(after.blocks))
    assert disk.read(tier, before) == disk.read(tier, after) == 4
    assert len(disk.segments()) == 2
    with pytest.raises(TierUnusable, match="in use"):
        disk.open()
    tier.close()
    tier = disk.open()
    assert (disk.read(tier, before), disk.read(tier, after)) == (0, 4)


def test_a_disk_that_is_gone_is_missed_by_nobody_but_writers(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(4)
    disk.write(tier, chain)
    shutil.rmtree(disk.directory.parent)
    fails_then_pauses(disk, tier)
    assert disk.read(tier, chain) == 4
    tier.close()
    disk.directory.parent.mkdir()


def test_without_file_descriptors_nothing_new_is_begun(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(4)
    disk.write(tier, chain)
    spare = [os.dup(0) for _ in range(8)]
    with limited(resource.RLIMIT_NOFILE, 3):
        fails_then_pauses(disk, tier)
        assert disk.read(tier, chain) == 4
    for fd in spare:
        os.close(fd)
    disk.now_s += 2
    disk.write(tier, disk.chain(4))


def test_pauses_grow_while_the_disk_stays_away(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(1)
    shutil.rmtree(disk.directory.parent)
    tried_s = []
    for _ in range(30):
        disk.now_s += 1
        num_errors = tier.stats().num_errors
        with pytest.raises(DiskFailed):
            tier.write(chain.run, list(chain.blocks))
        if tier.stats().num_errors > num_errors:
            tried_s.append(disk.now_s)
    assert [after - before for before, after in itertools.pairwise(tried_s)] == [1, 2, 4, 8]
    tier.close()
    disk.directory.parent.mkdir()


def test_a_disk_that_cannot_be_read_is_not_asked_for_what_is_behind(
    disk: "Disk", monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, chain = disk.open(capacity_bytes=1024 * disk.settings.block_bytes), disk.chain(8)
    disk.write(tier, chain)
    num_reads = 0

    def failing(*_args: object) -> int:
        nonlocal num_reads
        num_reads += 1
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as failure:
        failure.setattr(os, "preadv", failing)
        assert disk.read(tier, chain) == 0
    assert num_reads == 2  # all blocks at once, and the first one
    assert [number for number, key in enumerate(chain.run.keys) if key not in tier] == [0]
    assert (tier.stats().num_corrupted_blocks, tier.stats().num_errors) == (1, 1)
    assert disk.read(tier, chain.part(1, 8)) == 7


def test_a_disk_that_cannot_be_read_is_not_asked_again_and_again_for_what_should_move(
    disk: "Disk", monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, chain = disk.open(capacity_bytes=16 * 128 * disk.settings.block_bytes), disk.chain(24)
    disk.write(tier, disk.chain(1, salt="a"))
    disk.write(tier, chain)
    num_reads = 0

    def failing(*_arguments: object) -> int:
        nonlocal num_reads
        num_reads += 1
        raise OSError(errno.EIO, "Input/output error")

    tier.drop(root_key(model_fingerprint=b"model", cache_salt="a"))
    with monkeypatch.context() as failure:
        failure.setattr(os, "preadv", failing)
        tier.erase_dropped()
    tier.check()
    assert num_reads == 2  # all at once, and the first one
    assert tier.stats().num_blocks == 0


@pytest.mark.parametrize("most_bytes", [1000, 4096, 5000])
def test_a_disk_that_takes_a_part_of_what_it_is_given_is_given_the_rest(
    disk: "Disk", monkeypatch: pytest.MonkeyPatch, most_bytes: int
) -> None:
    capacity_bytes = 1024 * disk.settings.block_bytes  # one record has all of them
    tier, chain = disk.open(capacity_bytes=capacity_bytes), disk.chain(3)

    def short(fd: int, buffers: list[bytes], offset: int) -> int:
        return os.pwrite(fd, b"".join(buffers)[:most_bytes], offset)

    with monkeypatch.context() as slow:
        slow.setattr(os, "pwritev", short)
        disk.write(tier, chain)
    assert disk.read(tier, chain) == 3
    tier.close()
    assert disk.read(disk.open(capacity_bytes=capacity_bytes), chain) == 3


def test_a_header_that_does_not_fit_the_disk_is_no_damage_later(
    disk: "Disk", monkeypatch: pytest.MonkeyPatch
) -> None:
    capacity_bytes = 1024 * disk.settings.block_bytes
    tier, chain = disk.open(capacity_bytes=capacity_bytes), disk.chain(16)
    disk.write(tier, chain.part(0, 1))
    (path,) = disk.segments()
    pwritev = os.pwritev

    def full(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset < disk.settings.block_bytes:  # a header: half of it is written, then there is no more room
            pwritev(fd, [buffers[0][: len(buffers[0]) // 2]], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwritev(fd, buffers, offset)

    with monkeypatch.context() as failing:
        failing.setattr(os, "pwritev", full)
        with pytest.raises(DiskFailed, match="No space left"):
            tier.write(chain.run, list(chain.blocks))
    disk.now_s += 10
    disk.write(tier, chain.part(0, 2))
    tier.close()
    assert disk.segments() == [path]
    tier = disk.open(capacity_bytes=capacity_bytes)
    assert tier.stats().num_damaged == 0
    assert disk.read(tier, chain) == 2


def test_a_slow_disk_keeps_nobody_waiting_but_its_readers(
    disk: "Disk", monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, chain, other = disk.open(), disk.chain(3), disk.chain(3)
    disk.write(tier, chain)
    is_reading, may_go_on = threading.Event(), threading.Event()
    preadv = os.preadv

    def slow(*args: object) -> int:
        is_reading.set()
        assert may_go_on.wait(SOON_S)
        return preadv(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", slow)
    found: list[int] = []
    reader = threading.Thread(target=lambda: found.append(disk.read(tier, chain)))
    reader.start()
    assert is_reading.wait(SOON_S)
    assert tier.longest_prefix(chain.run.keys) == 3
    disk.write(tier, other)
    assert tier.drop(None) == 6
    tier.erase_dropped()  # deletes the file that is being read
    tier.check()
    tier.close()
    with pytest.raises(TierUnusable, match="in use"):
        disk.open()
    may_go_on.set()
    reader.join(SOON_S)
    assert found == [3]
    disk.open()
