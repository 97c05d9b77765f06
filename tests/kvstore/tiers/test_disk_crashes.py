"""What a process that died, or a machine, leaves of the disk tier, and the next start makes of it."""

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvstore.tiers.record import header_bytes
from kvstore.tiers.segment_header import SEGMENT_HEADER_BYTES

if TYPE_CHECKING:
    from conftest import Disk


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
