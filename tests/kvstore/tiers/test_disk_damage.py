"""The disk tier on a disk that lies: damage is found, costs what it hit and nothing else."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blocks import BlockKey, root_key
from kvstore.tiers import disk_writer, placed
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_settings import DiskSettings
from kvstore.tiers.record import header_bytes
from kvstore.tiers.segment_header import SEGMENT_HEADER_BYTES
from kvstore.tiers.tier import BlockRun

if TYPE_CHECKING:
    from conftest import Disk


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


def test_a_sealed_block_that_was_changed_along_with_its_checksum_does_not_open(
    disk: "Disk", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checksums have no secret: whoever changes a block can make the one that fits."""
    for module in (disk_writer, placed):
        monkeypatch.setattr(module, "block_checksums", lambda keys, stored: (0,) * len(keys))
    tier = disk.open(key=bytes(32), capacity_bytes=1024 * disk.settings.block_bytes)
    chain = disk.chain(3)
    disk.write(tier, chain)
    (path,) = disk.segments()
    flip(path, path.stat().st_size - disk.settings.block_bytes - 300)  # in the second of three
    assert disk.read(tier, chain) == 1
    assert [number for number, key in enumerate(chain.run.keys) if key not in tier] == [1]


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
