"""The disk tier on a healthy disk: what it keeps, drops, moves, finds again and hides."""

import os
import shutil
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import root_key
from kvstore.errors import DiskFailed, TierUnusable
from kvstore.tiers.disk_settings import DiskSettings
from kvstore.tiers.seal import SEAL_BYTES
from kvstore.tiers.segment_layout import SegmentLayout

if TYPE_CHECKING:
    from conftest import Disk

KEY = bytes(range(32))


def test_blocks_come_back_as_they_were(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(10)
    disk.write(tier, chain)
    assert tier.longest_prefix(chain.run.keys) == 10
    assert chain.run.keys[9] in tier
    assert disk.read(tier, chain) == 10
    assert tier.take_changes() == (list(chain.run.keys), [])
    assert tier.take_changes() == ([], [])


def test_a_part_of_a_chain_is_read_from_its_middle(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(10)
    disk.write(tier, chain)
    assert disk.read(tier, chain.part(4, 7)) == 3


def test_a_chain_written_in_parts_is_read_at_once(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(9)
    for start in (0, 3, 6):
        disk.write(tier, chain.part(start, start + 3))
    assert disk.read(tier, chain) == 9


def test_nothing_is_read_of_what_is_not_held(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(4)
    assert disk.read(tier, chain) == 0
    disk.write(tier, chain.part(0, 2))
    assert tier.longest_prefix(chain.run.keys) == disk.read(tier, chain) == 2


def test_the_second_writer_of_a_block_writes_nothing(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(6)
    disk.write(tier, chain.part(0, 4))
    used_bytes = tier.stats().used_bytes
    disk.write(tier, chain.part(0, 4))
    assert tier.stats().used_bytes == used_bytes
    disk.write(tier, chain)
    assert tier.stats().num_stored_blocks == 6
    assert disk.read(tier, chain) == 6


def test_two_threads_write_the_same_chains_once(disk: "Disk") -> None:
    tier, chains = disk.open(), [disk.chain(4) for _ in range(8)]

    def write_all() -> None:
        for chain in chains:
            tier.write(chain.run, list(chain.blocks))

    threads = [threading.Thread(target=write_all) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tier.check()
    assert tier.stats().num_stored_blocks == 32
    assert [disk.read(tier, chain) for chain in chains] == [4] * 8


def test_a_run_that_names_a_block_twice_is_kept_once_wherever_it_moves(disk: "Disk") -> None:
    capacity_bytes = 1024 * disk.settings.block_bytes  # all lies in one segment
    tier = disk.open(capacity_bytes=capacity_bytes)
    chain, other = disk.chain(2), disk.chain(1, salt="other")
    run = replace(chain.run, keys=(*chain.run.keys, chain.run.keys[0]))
    disk.write(tier, other)
    tier.write(run, [*chain.blocks, chain.blocks[0]])
    tier.check()
    tier.drop(other.run.root)
    tier.erase_dropped()
    tier.check()
    assert disk.read(tier, chain) == tier.stats().num_blocks == 2
    tier.close()
    tier = disk.open(capacity_bytes=capacity_bytes)
    tier.check()
    assert disk.read(tier, chain) == tier.stats().num_blocks == 2


def test_what_is_no_block_is_refused(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(2)
    with pytest.raises(ValueError, match="2 blocks comes with as many, got 1"):
        tier.write(chain.run, [chain.blocks[0]])
    with pytest.raises(ValueError, match="4096 bytes"):
        tier.write(chain.run, [chain.blocks[0, :-1], chain.blocks[1]])
    with pytest.raises(ValueError, match=r"got \(4096,\) of uint8, \(2,\) bytes apart"):
        tier.write(chain.run, list(chain.blocks.repeat(2, axis=1)[:, ::2]))
    assert tier.stats().num_errors == 0


def test_the_least_recently_used_chain_leaves_from_its_end(disk: "Disk") -> None:
    tier = disk.open(policy="lru")
    num_slots = tier.stats().capacity_blocks
    old, used, new = disk.chain(8), disk.chain(num_slots - 8), disk.chain(3)
    disk.write(tier, old)
    disk.write(tier, used)
    disk.now_s += 1
    disk.read(tier, used)
    disk.write(tier, new)
    assert disk.read(tier, old) == 5
    assert disk.read(tier, used) == num_slots - 8
    assert disk.read(tier, new) == 3
    assert tier.stats().num_evicted_blocks == 3
    assert set(old.run.keys[5:]) <= set(tier.take_changes()[1])


def test_a_run_longer_than_the_tier_leaves_its_beginning(disk: "Disk") -> None:
    tier = disk.open()
    num_slots = tier.stats().capacity_blocks
    chain = disk.chain(num_slots + 20)
    disk.write(tier, chain)
    assert disk.read(tier, chain) == num_slots


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "sealed"])
def test_what_is_used_survives_as_others_come_and_go(disk: "Disk", key: bytes | None) -> None:
    tier, kept = disk.open(policy="lru", key=key), [disk.chain(2) for _ in range(5)]
    for number in range(120):
        disk.write(tier, disk.chain(3))
        if number < len(kept):
            disk.write(tier, kept[number])
        for chain in kept:
            tier.read(chain.run.keys[:2], list(np.empty((2, 4096), np.uint8)))
    assert [disk.read(tier, chain) for chain in kept] == [2] * 5
    assert tier.stats().num_moved_blocks > 0
    assert tier.stats().num_errors == 0


def test_a_restart_finds_everything(disk: "Disk") -> None:
    tier, chains = disk.open(), [disk.chain(5) for _ in range(6)]
    for chain in chains:
        disk.write(tier, chain)
    tier.close()
    tier = disk.open()
    tier.check()
    stored, removed = tier.take_changes()
    assert sorted(stored) == sorted(key for chain in chains for key in chain.run.keys)
    assert removed == []
    assert [disk.read(tier, chain) for chain in chains] == [5] * 6
    assert tier.stats().num_damaged == 0


def test_a_restart_remembers_about_when_blocks_were_used(disk: "Disk") -> None:
    tier = disk.open(policy="lru")
    num_slots = tier.stats().capacity_blocks
    first, second = disk.chain(num_slots // 2), disk.chain(num_slots - num_slots // 2)
    disk.write(tier, first)
    disk.write(tier, second)
    tier.close()
    tier = disk.open(policy="lru")
    disk.write(tier, disk.chain(4))
    assert disk.read(tier, second) == len(second.run.keys)
    assert disk.read(tier, first) == len(first.run.keys) - 4


def test_restarts_leave_no_trail_of_small_files(disk: "Disk") -> None:
    for _ in range(5):
        tier = disk.open()
        disk.write(tier, disk.chain(1))
        tier.close()
    assert len(disk.segments()) == -(-5 // 3)


@pytest.mark.parametrize("share", [2, 3])
def test_a_smaller_tier_keeps_what_fits(disk: "Disk", share: int) -> None:
    tier, chains = disk.open(policy="lru"), [disk.chain(4) for _ in range(10)]
    for chain in chains:
        disk.write(tier, chain)
    tier.close()
    tier = disk.open(policy="lru", capacity_bytes=disk.settings.capacity_bytes // share)
    tier.check()
    disk.check_size(tier)
    assert 0 < tier.stats().num_blocks <= tier.stats().capacity_blocks
    assert disk.read(tier, chains[0]) == 0


def test_a_segment_larger_than_the_tier_has_become_gives_its_room(disk: "Disk") -> None:
    tier = disk.open(capacity_bytes=64 * disk.settings.capacity_bytes)
    for _ in range(30):
        disk.write(tier, disk.chain(4))
    assert len(disk.segments()) == 1
    tier.close()
    tier, chain = disk.open(), disk.chain(4)
    tier.check()
    disk.check_size(tier)
    disk.write(tier, chain)
    assert disk.read(tier, chain) == 4


def test_a_dropped_chain_is_gone_for_good(disk: "Disk") -> None:
    tier, mine, theirs = disk.open(), disk.chain(6, salt="a"), disk.chain(6, salt="b")
    for start in (0, 2, 4):
        disk.write(tier, mine.part(start, start + 2))
        disk.write(tier, theirs.part(start, start + 2))
    assert tier.drop(root_key(model_fingerprint=b"model", cache_salt="a")) == 6
    assert tier.longest_prefix(mine.run.keys) == 0
    tier.erase_dropped()
    on_disk = b"".join(path.read_bytes() for path in disk.segments())
    assert not any(block.tobytes() in on_disk for block in mine.blocks)
    assert disk.read(tier, theirs) == 6
    tier.close()
    tier = disk.open()
    assert tier.longest_prefix(mine.run.keys) == 0
    assert disk.read(tier, theirs) == 6


def test_dropping_all_frees_all(disk: "Disk") -> None:
    tier = disk.open()
    for _ in range(30):
        disk.write(tier, disk.chain(4))
    assert tier.drop(None) == tier.stats().capacity_blocks
    tier.erase_dropped()
    assert disk.segments() == []
    assert tier.stats().num_blocks == 0
    disk.write(tier, disk.chain(1))


def test_blocks_of_another_model_are_counted_and_leave_first(disk: "Disk") -> None:
    other = disk.open(namespace=b"another model")
    for _ in range(10):
        disk.write(other, disk.chain(4))
    other.close()
    tier, chains = disk.open(), [disk.chain(4) for _ in range(9)]
    assert tier.stats().num_foreign > 0
    assert tier.stats().num_blocks == 0
    for chain in chains:
        disk.write(tier, chain)
    assert [disk.read(tier, chain) for chain in chains] == [4] * 9
    assert tier.stats().num_evicted_blocks == 0


def test_dropping_all_frees_what_another_model_left(disk: "Disk") -> None:
    other = disk.open(namespace=b"another model")
    disk.write(other, disk.chain(4))
    other.close()
    tier = disk.open()
    assert tier.drop(None) == 0
    tier.erase_dropped()
    assert disk.segments() == []
    disk.check_size(tier)


def test_what_another_model_left_and_cannot_be_removed_stops_nothing(
    disk: "Disk", monkeypatch: pytest.MonkeyPatch
) -> None:
    other = disk.open(namespace=b"another model")
    disk.write(other, disk.chain(2))
    other.close()
    (foreign,) = disk.segments()
    tier = disk.open()
    disk.write(tier, disk.chain(2))
    tier.drop(None)
    unlink = Path.unlink

    def refuse(path: Path, **fields: bool) -> None:
        if path == foreign:
            raise PermissionError("Operation not permitted")
        unlink(path, **fields)

    with monkeypatch.context() as failing:
        failing.setattr(Path, "unlink", refuse)
        tier.erase_dropped()
    assert disk.segments() == [foreign]
    chain = disk.chain(2)
    disk.write(tier, chain)
    assert disk.read(tier, chain) == 2


def test_blocks_of_another_shape_are_foreign(disk: "Disk") -> None:
    tier = disk.open()
    disk.write(tier, disk.chain(4))
    tier.close()
    assert disk.open(block_bytes=2048).stats().num_foreign == 2


def test_segments_of_another_version_are_counted(disk: "Disk") -> None:
    tier = disk.open()
    disk.write(tier, disk.chain(4))
    tier.close()
    for path in disk.segments():
        with path.open("r+b") as file:
            file.seek(8)
            file.write((1).to_bytes(4, "little"))
    stats = disk.open().stats()
    assert (stats.num_other_version, stats.num_foreign, stats.num_blocks) == (2, 0, 0)


def test_one_directory_serves_one_process(disk: "Disk") -> None:
    tier = disk.open()
    code = (
        "import sys; from pathlib import Path; from kvstore.tiers.disk import DiskTier;"
        "from kvstore.tiers.disk_settings import DiskSettings;"
        "DiskTier.open(Path(sys.argv[1]), settings=DiskSettings(block_bytes=4096, capacity_bytes=2**20, namespace=b''))"
    )
    command = [sys.executable, "-c", code, str(disk.directory)]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode != 0
    assert "TierUnusable" in second.stderr
    assert "in use by another process" in second.stderr
    with pytest.raises(TierUnusable, match="in use"):
        disk.open()
    tier.close()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_nobody_else_may_look(disk: "Disk") -> None:
    tier = disk.open()
    disk.write(tier, disk.chain(4))
    assert stat.S_IMODE(os.stat(disk.directory).st_mode) == 0o700
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in disk.directory.iterdir()} == {0o600}


def test_sealed_blocks_are_unreadable_on_disk_and_come_back(disk: "Disk") -> None:
    tier, chain = disk.open(key=KEY), disk.chain(9)
    disk.write(tier, chain)
    on_disk = b"".join(path.read_bytes() for path in disk.segments())
    assert not any(block[:64].tobytes() in on_disk for block in chain.blocks)
    assert disk.read(tier, chain) == 9
    tier.close()
    assert disk.read(disk.open(key=KEY), chain) == 9


@pytest.mark.parametrize(
    ("key", "complaint"),
    [(bytes(32), "another key.*or remove /.*/kv"), (None, "was given no key.*or remove /.*/kv")],
    ids=["another", "none"],
)
def test_the_wrong_key_opens_nothing_and_spoils_nothing(
    disk: "Disk", key: bytes | None, complaint: str
) -> None:
    tier, chain = disk.open(key=KEY), disk.chain(4)
    disk.write(tier, chain)
    tier.close()
    with pytest.raises(TierUnusable, match=complaint):
        disk.open(key=key)
    assert disk.read(disk.open(key=KEY), chain) == 4


@pytest.mark.parametrize("namespace", [b"model", b"another model"])
def test_what_was_written_in_the_clear_is_gone_once_a_key_is_given(disk: "Disk", namespace: bytes) -> None:
    tier, chain = disk.open(namespace=namespace), disk.chain(4)
    disk.write(tier, chain)
    tier.close()
    tier = disk.open(key=KEY)
    assert tier.stats().num_foreign == 2
    assert tier.longest_prefix(chain.run.keys) == 0
    assert disk.segments() == []
    disk.check_size(tier)


def test_what_may_be_in_the_clear_is_gone_once_a_key_is_given(disk: "Disk") -> None:
    tier = disk.open()
    disk.write(tier, disk.chain(6))
    tier.close()
    damaged, older = disk.segments()
    for path, offset in ((damaged, 50), (older, 8)):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"\x01\x00")
    tier = disk.open(key=KEY)
    assert (tier.stats().num_damaged, tier.stats().num_other_version) == (1, 1)
    assert disk.segments() == []


def test_an_empty_file_does_not_cost_what_is_sealed_of_another_model(disk: "Disk") -> None:
    other, chain = disk.open(key=KEY, namespace=b"another model"), disk.chain(2)
    disk.write(other, chain)
    other.close()
    empty = disk.directory / f"segment-{77:016x}.kv"
    empty.touch()
    disk.open(key=KEY).close()
    assert not empty.exists()
    assert disk.read(disk.open(key=KEY, namespace=b"another model"), chain) == 2


def test_sealed_blocks_of_another_model_stay_until_their_room_is_needed(disk: "Disk") -> None:
    tier, chain = disk.open(key=KEY, namespace=b"another model"), disk.chain(2)
    disk.write(tier, chain)
    tier.close()
    disk.open(key=KEY).close()
    assert disk.read(disk.open(key=KEY, namespace=b"another model"), chain) == 2


def test_what_is_in_the_clear_and_cannot_be_removed_opens_nothing(
    disk: "Disk", monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, chain = disk.open(), disk.chain(2)
    disk.write(tier, chain)
    tier.close()

    def refuse(*_arguments: object, **_fields: object) -> None:
        raise PermissionError("Operation not permitted")

    with monkeypatch.context() as failing:
        failing.setattr(Path, "unlink", refuse)
        with pytest.raises(TierUnusable, match="cannot remove what is not encrypted"):
            disk.open(key=KEY)
    assert disk.read(disk.open(), chain) == 2


def test_a_closed_tier_reads_nothing_and_writes_nothing(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(4)
    disk.write(tier, chain)
    tier.close()
    tier.close()
    assert tier.read(chain.run.keys, list(np.empty((4, 4096), np.uint8))) == 0
    with pytest.raises(DiskFailed, match="closed"):
        tier.write(disk.chain(1).run, list(disk.chain(1).blocks))


def test_prefixes_tell_what_is_held(disk: "Disk") -> None:
    tier, chain = disk.open(), disk.chain(4)
    disk.write(tier, chain)
    disk.now_s += 10
    disk.read(tier, chain)
    disk.now_s += 5
    (prefix,) = tier.prefixes(10)
    assert (prefix.last_key, prefix.num_blocks, prefix.num_hits) == (chain.run.keys[3], 4, 1)
    assert prefix.age_s == pytest.approx(15)
    assert prefix.idle_s == pytest.approx(5)


def test_small_blocks_and_small_tiers_always_find_room(disk: "Disk") -> None:
    for block_bytes in (64, 512, 2048):
        for capacity_bytes in (2**16, 3 * 2**15, 2**18):
            shutil.rmtree(disk.directory, ignore_errors=True)
            tier = disk.open(block_bytes=block_bytes, capacity_bytes=capacity_bytes)
            num_slots = tier.stats().capacity_blocks
            for _ in range(4):
                chain = disk.chain(num_slots)
                for start in range(0, num_slots, 5):
                    part = chain.part(start, min(num_slots, start + 5))
                    tier.write(part.run, list(np.ascontiguousarray(part.blocks[:, :block_bytes])))
            tier.check()
            assert tier.stats().num_blocks > 0
            tier.close()


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"capacity_bytes": 4096}, "at least 65536 bytes, got 4096"),
        ({"block_bytes": 0}, "block_bytes must be at least 1"),
        ({"policy": "fifo"}, "policy must be one of lru, cost"),
        ({"key": b"short"}, "32 bytes, got 5"),
    ],
)
def test_impossible_settings_are_refused(changed: dict[str, object], complaint: str) -> None:
    values = {"block_bytes": 4096, "capacity_bytes": 2**20, "namespace": b"", **changed}
    with pytest.raises(ValueError, match=complaint):
        DiskSettings(**values)  # type: ignore[arg-type]


@given(
    block_bytes=st.integers(1, 2**24),
    factor=st.floats(8, 1e5),
    key=st.sampled_from([None, KEY]),
)
def test_whatever_the_sizes_live_blocks_leave_room_to_move(
    block_bytes: int, factor: float, key: bytes | None
) -> None:
    stored_bytes = block_bytes + (0 if key is None else SEAL_BYTES)
    least_bytes = SegmentLayout.of(stored_bytes=stored_bytes, capacity_bytes=0).segment_bytes
    settings = DiskSettings(
        block_bytes=block_bytes, capacity_bytes=int(factor * least_bytes), namespace=b"", key=key
    )
    live_bytes = settings.num_slots * settings.form.stored_bytes
    assert 0 < live_bytes <= settings.capacity_bytes - 3 * settings.layout.segment_bytes
    assert 8 <= settings.capacity_bytes // settings.layout.segment_bytes <= 257


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
