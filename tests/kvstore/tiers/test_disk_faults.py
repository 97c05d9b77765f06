"""The disk tier on a disk that is full, read-only, gone, slow or lies, and after a process that died."""

import contextlib
import errno
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blocks import BlockKey, root_key
from kvstore.errors import DiskFailed, TierUnusable
from kvstore.tiers import placed
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_settings import DiskSettings
from kvstore.tiers.record import header_bytes
from kvstore.tiers.segment_header import SEGMENT_HEADER_BYTES
from kvstore.tiers.tier import BlockRun

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


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 4]))


@pytest.mark.parametrize("key", [None, bytes(32)], ids=["plain", "sealed"])
def test_a_flipped_bit_ends_a_run_and_costs_one_block(disk: "Disk", key: bytes | None) -> None:
    capacity_bytes = 1024 * disk.settings.block_bytes
    tier, chain = disk.open(key=key, capacity_bytes=capacity_bytes), disk.chain(3)
    disk.write(tier, chain)
    (path,) = disk.segments()
    flip(path, path.stat().st_size - disk.settings.block_bytes - 300)  # in the second of three
    assert disk.read(tier, chain) == 1
    assert chain.run.keys[1] not in tier
    assert tier.take_changes()[1] == [chain.run.keys[1]]
    stats = tier.stats()
    assert (stats.num_corrupted_blocks, stats.num_errors) == (1, 1)
    assert disk.read(tier, chain.part(2, 3)) == 1
    disk.write(tier, chain)
    assert disk.read(tier, chain) == 3
    tier.close()
    assert disk.read(disk.open(key=key, capacity_bytes=capacity_bytes), chain) == 3


def test_all_damage_in_what_is_read_is_found_at_once(disk: "Disk") -> None:
    tier, chain = disk.open(capacity_bytes=1024 * disk.settings.block_bytes), disk.chain(8)
    disk.write(tier, chain)
    (path,) = disk.segments()
    for number in (2, 3, 4, 6):
        flip(path, path.stat().st_size - (8 - number) * disk.settings.block_bytes + 5)
    assert disk.read(tier, chain) == 2
    assert [number for number, key in enumerate(chain.run.keys) if key not in tier] == [2, 3, 4, 6]
    assert (tier.stats().num_corrupted_blocks, tier.stats().num_errors) == (4, 4)
    disk.write(tier, chain)
    assert disk.read(tier, chain) == 8


def test_damage_beyond_what_one_read_brings_is_left_for_another(
    disk: "Disk", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placed, "MAX_EXTENT_BLOCKS", 3)
    tier, chain = disk.open(capacity_bytes=1024 * disk.settings.block_bytes), disk.chain(8)
    disk.write(tier, chain)
    (path,) = disk.segments()
    for number in (3, 5, 6):
        flip(path, path.stat().st_size - (8 - number) * disk.settings.block_bytes + 5)
    assert disk.read(tier, chain) == 3
    assert [number for number, key in enumerate(chain.run.keys) if key not in tier] == [3, 5]


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


def test_a_truncated_file_costs_what_was_cut_off(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(3)
    disk.write(tier, chain)
    (path,) = disk.segments()
    os.truncate(path, path.stat().st_size - 100)
    assert disk.read(tier, chain) == 2
    assert tier.longest_prefix(chain.run.keys) == 2


def test_blocks_that_cannot_be_read_do_not_move(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(3)
    disk.write(tier, disk.chain(1, salt="a"))
    disk.write(tier, chain)
    flip(disk.segments()[0], 2 * 4096 + 3000)
    disk.write(tier, disk.chain(3))
    tier.drop(root_key(model_fingerprint=b"model", cache_salt="a"))
    tier.erase_dropped()
    tier.check()
    assert tier.stats().num_corrupted_blocks == 1
    assert [disk.read(tier, chain.part(n, n + 1)) for n in range(3)] == [0, 1, 1]


def test_however_many_blocks_are_damaged_the_others_move_after_few_reads(
    disk: "Disk", monkeypatch: pytest.MonkeyPatch
) -> None:
    num_blocks = 24
    capacity_bytes = 16 * 128 * disk.settings.block_bytes
    tier, chain = disk.open(capacity_bytes=capacity_bytes), disk.chain(num_blocks)
    disk.write(tier, disk.chain(1, salt="a"))
    disk.write(tier, chain)
    (path,) = disk.segments()
    damaged = {0, 1, *range(5, num_blocks, 2)}
    for number in damaged:
        flip(path, path.stat().st_size - (num_blocks - number) * disk.settings.block_bytes + 5)
    num_reads = 0
    preadv = os.preadv

    def counted(*arguments: object) -> int:
        nonlocal num_reads
        num_reads += 1
        return preadv(*arguments)  # type: ignore[arg-type]

    tier.drop(root_key(model_fingerprint=b"model", cache_salt="a"))
    with monkeypatch.context() as counting:
        counting.setattr(os, "preadv", counted)
        tier.erase_dropped()
    tier.check()
    assert tier.stats().num_corrupted_blocks == len(damaged)
    whole = set(range(num_blocks)) - damaged
    assert {number for number, key in enumerate(chain.run.keys) if key in tier} == whole
    assert all(disk.read(tier, chain.part(number, number + 1)) == 1 for number in whole)
    # All at once, and then each stretch between two that are damaged.
    assert num_reads == 1 + sum(number + 1 not in whole for number in whole)


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


@pytest.mark.parametrize("lost_bytes", [1, 4096, 5000, 8400])
def test_a_torn_tail_is_cut_off(disk: "Disk", lost_bytes: int) -> None:
    tier, chain = disk.open(), disk.chain(2)
    disk.write(tier, chain.part(0, 1))
    (path,) = disk.segments()
    whole_bytes = path.stat().st_size
    disk.write(tier, chain)
    tier.close()
    os.truncate(path, max(whole_bytes, path.stat().st_size - lost_bytes))
    tier = disk.open()
    assert path.stat().st_size == whole_bytes
    disk.check_size(tier)
    assert disk.read(tier, chain) == 1
    disk.write(tier, chain)
    assert disk.read(tier, chain) == 2


def test_a_corrupted_record_costs_only_itself(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(3)
    for start in range(3):
        disk.write(tier, chain.part(start, start + 1))
    tier.close()
    flip(disk.segments()[0], SEGMENT_HEADER_BYTES + header_bytes(1) + 30)  # in the header of the second
    tier = disk.open()
    assert tier.stats().num_damaged == 1
    assert disk.read(tier, chain) == 1
    assert disk.read(tier, chain.part(2, 3)) == 1


def test_a_header_whose_blocks_are_gone_is_not_one_of_those_that_take_their_place(disk: "Disk") -> None:
    # Records of many blocks, whose headers do not end where those of the lost ones did.
    capacity_bytes = 1024 * disk.settings.block_bytes
    tier, lost, chain = disk.open(capacity_bytes=capacity_bytes), disk.chain(4), disk.chain(4)
    for start in range(4):
        disk.write(tier, lost.part(start, start + 1))
    tier.close()
    (path,) = disk.segments()
    whole_bytes = path.stat().st_size
    os.truncate(path, whole_bytes - 4 * disk.settings.block_bytes)
    tier = disk.open(capacity_bytes=capacity_bytes)
    assert tier.stats().num_damaged == 1
    disk.write(tier, chain)
    tier.close()
    assert path.stat().st_size == whole_bytes
    tier = disk.open(capacity_bytes=capacity_bytes)
    assert (tier.stats().num_blocks, tier.stats().num_damaged) == (4, 0)
    assert disk.read(tier, chain) == 4


@pytest.mark.parametrize("size_bytes", [SEGMENT_HEADER_BYTES, 1000])
def test_a_file_that_ends_before_its_first_block_goes_on_behind_its_headers(
    disk: "Disk", size_bytes: int
) -> None:
    tier, chain = disk.open(), disk.chain(2)
    disk.write(tier, chain)
    tier.close()
    (path,) = disk.segments()
    os.truncate(path, size_bytes)
    tier = disk.open()
    assert tier.stats().num_blocks == 0
    disk.write(tier, chain)
    assert disk.read(tier, chain) == 2
    tier.close()
    assert disk.read(disk.open(), chain) == 2


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


def test_a_tail_of_blocks_and_a_tail_of_headers_are_damage_each(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(1)
    disk.write(tier, chain)
    tier.close()
    (path,) = disk.segments()
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(b"torn")
    tier = disk.open()
    assert tier.stats().num_damaged == 1
    tier.close()
    with path.open("r+b") as file:
        file.seek(SEGMENT_HEADER_BYTES + header_bytes(1) + 10)
        file.write(b"torn")
    tier = disk.open()
    assert tier.stats().num_damaged == 1
    tier.close()
    tier = disk.open()
    assert (tier.stats().num_damaged, disk.read(tier, chain)) == (0, 1)


def test_a_segment_of_a_smaller_tier_ends_where_its_headers_do(disk: "Disk") -> None:
    """It may grow larger in the larger tier, but has no room for so many headers."""
    small, chain = 2**18, disk.chain(400)
    tier = disk.open(capacity_bytes=small)
    disk.write(tier, chain.part(0, 1))
    tier.close()
    tier = disk.open(capacity_bytes=64 * small)
    for start in range(400):
        disk.write(tier, chain.part(start, start + 1))
    assert len(disk.segments()) > 1
    assert disk.read(tier, chain) == 400
    tier.close()
    tier = disk.open(capacity_bytes=64 * small)
    assert tier.stats().num_damaged == 0
    assert disk.read(tier, chain) == 400


def test_a_segment_whose_header_is_corrupted_is_dropped_and_counted(disk: "Disk") -> None:
    tier, chains = disk.open(), [disk.chain(3) for _ in range(3)]
    for chain in chains:
        disk.write(tier, chain)
    tier.close()
    flip(disk.segments()[1], 40)
    tier = disk.open()
    assert tier.stats().num_damaged == 1
    assert [disk.read(tier, chain) for chain in chains] == [3, 0, 3]


@settings(max_examples=60)
@given(junk=st.binary(max_size=20_000), at=st.floats(0, 1), cut=st.booleans())
def test_whatever_is_in_the_files_only_true_blocks_are_read(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: float, cut: bool
) -> None:
    directory = tmp_path_factory.mktemp("kv")
    form = DiskSettings(block_bytes=256, capacity_bytes=2**17, namespace=b"")
    tier = DiskTier.open(directory, settings=form)
    keys = tuple(BlockKey(number.to_bytes(16, "little")) for number in range(1, 21))
    run = BlockRun(root=BlockKey(bytes(16)), parent=BlockKey(bytes(16)), first_position=0, keys=keys)
    blocks = np.random.default_rng(0).integers(0, 256, (20, 256), dtype=np.uint8)
    for start in range(0, 20, 4):
        tier.write(run.part(start, start + 4), list(blocks[start : start + 4]))
    tier.close()
    path = sorted(directory.glob("segment-*"))[0]
    data = bytearray(path.read_bytes())
    offset = int(at * len(data))
    data[offset : offset + len(junk)] = junk
    path.write_bytes(data[: offset + len(junk)] if cut else data)
    tier = DiskTier.open(directory, settings=form)
    tier.check()
    into = np.zeros_like(blocks)
    for start in range(20):
        num_read = tier.read(run.keys[start:], list(into[start:]))
        assert np.array_equal(into[start : start + num_read], blocks[start : start + num_read])
    tier.close()
    shutil.rmtree(directory)


def test_a_killed_writer_leaves_what_it_had_written(disk: "Disk") -> None:
    code = (
        "import sys, time; import numpy as np; from pathlib import Path\n"
        "from kvstore.tiers.disk import DiskTier; from kvstore.tiers.disk_settings import DiskSettings\n"
        "from kvstore.tiers.tier import BlockRun\n"
        "tier = DiskTier.open(Path(sys.argv[1]), settings=DiskSettings(\n"
        "    block_bytes=4096, capacity_bytes=2**18, namespace=b'model'))\n"
        "root = bytes(16)\n"
        "for number in range(1, 10**9):\n"
        "    key = number.to_bytes(16, 'little')\n"
        "    run = BlockRun(root=root, parent=root, first_position=0, keys=(key,))\n"
        "    tier.write(run, [np.full(4096, number % 251, np.uint8)])\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(disk.directory)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        last = 0
        while last < 200:
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        last = int((process.stdout.read().splitlines() or [last])[-1])
    tier = disk.open()
    tier.check()
    disk.check_size(tier)
    newest = [number.to_bytes(16, "little") for number in range(last - 15, last + 1)]
    into = np.empty(4096, np.uint8)
    for number, key in enumerate(newest, last - 15):
        assert tier.read([key], [into]) == 1  # type: ignore[list-item]
        assert (into == number % 251).all()


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
