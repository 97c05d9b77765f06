"""The tiers against what carries them: the disk tier against bare file I/O, page copies against memcpy; and what they
bring: the first hit after a restart, and the later turns of conversations (bench/kv_conversations.py).

    python -m bench.kv_tiers [--quick]

Both sides move the same bytes in the same sizes through the page cache of the same file system, alternating in one
run; writes end when the disk has all of it, reads begin with the cache emptied of the files. Bare writes are told to
the kernel in the same steps as ours (kvstore/tiers/segment.py).
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.kv_conversations import measure_restart, measure_turns
from bench.report import Claim, write_report
from kvstore.blocks import BlockKey
from kvstore.layout import KvLayout
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_settings import DiskSettings
from kvstore.tiers.segment import WRITE_BACK_BYTES
from kvstore.tiers.segment_layout import LARGEST_SEGMENT_BYTES, SEGMENTS_PER_TIER
from kvstore.tiers.tier import BlockRun
from workers.engine.kv_pool import KvPool

# The model that ships with us, in float32: 64 KiB a block.
LAYOUT = KvLayout(num_layers=4, num_kv_heads=4, head_dim=32, dtype="float32")
# What is written behind and loaded at a time: 256 tokens.
CHUNK_BLOCKS = 16
# Its segments are as large as those of larger tiers.
TIER_BYTES = SEGMENTS_PER_TIER * LARGEST_SEGMENT_BYTES
ROOT = BlockKey(bytes(16))


class DiskBench:
    """The same runs of blocks in a tier and in a bare file."""

    def __init__(self, directory: Path, *, run_blocks: int, num_blocks: int) -> None:
        self._tier_path, self._file_path = directory / "tier", directory / "bare"
        self._num_bytes = num_blocks * LAYOUT.block_bytes
        self._runs = _runs(run_blocks, num_blocks)
        # More than the processor caches hold: blocks come from an arena, not from a cache.
        arena = np.random.default_rng(0).integers(0, 256, (1024, LAYOUT.block_bytes), dtype=np.uint8)
        self._blocks = [arena[start : start + run_blocks] for start in range(0, 1024, run_blocks)]
        self._into = np.empty_like(self._blocks)
        self._settings = DiskSettings(
            block_bytes=LAYOUT.block_bytes, capacity_bytes=TIER_BYTES, namespace=b"bench"
        )

    def write_tier(self) -> float:
        """MB/s, as all of these."""
        shutil.rmtree(self._tier_path, ignore_errors=True)
        os.sync()  # what was just deleted is discarded by the disk, which takes its time
        tier = DiskTier.open(self._tier_path, settings=self._settings)
        started_s = time.perf_counter()
        for number, run in enumerate(self._runs):
            tier.write(run, list(self._blocks[number % len(self._blocks)]))
        _sync(self._tier_path.glob("segment-*"))
        mb_s = self._mb_s(started_s)
        tier.close()
        return mb_s

    def write_file(self) -> float:
        self._file_path.unlink(missing_ok=True)
        os.sync()
        fd = os.open(self._file_path, os.O_RDWR | os.O_CREAT, 0o600)
        end = told = 0
        started_s = time.perf_counter()
        for number in range(len(self._runs)):
            end += os.pwritev(fd, list(self._blocks[number % len(self._blocks)]), end)
            if end - told >= WRITE_BACK_BYTES:
                start = max(0, told - WRITE_BACK_BYTES)
                os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)
                told = end
        os.fsync(fd)
        mb_s = self._mb_s(started_s)
        os.close(fd)
        return mb_s

    def read_tier(self) -> float:
        _forget_cached(self._tier_path.glob("segment-*"))
        tier = DiskTier.open(self._tier_path, settings=self._settings)
        started_s = time.perf_counter()
        num_read = sum(
            tier.read(run.keys, list(self._into[number % len(self._into)]))
            for number, run in enumerate(self._runs)
        )
        mb_s = self._mb_s(started_s)
        tier.close()
        if num_read * LAYOUT.block_bytes != self._num_bytes:
            raise RuntimeError(f"only {num_read} blocks came back")
        return mb_s

    def read_file(self) -> float:
        _forget_cached([self._file_path])
        fd = os.open(self._file_path, os.O_RDONLY)
        end = 0
        started_s = time.perf_counter()
        for number in range(len(self._runs)):
            end += os.preadv(fd, list(self._into[number % len(self._into)]), end)
        mb_s = self._mb_s(started_s)
        os.close(fd)
        return mb_s

    def _mb_s(self, started_s: float) -> float:
        return self._num_bytes / (time.perf_counter() - started_s) / 1e6


class CopyBench:
    """Blocks between device pages and an arena, in chunks; and as many bytes from one array to another."""

    def __init__(self, *, num_blocks: int) -> None:
        self._pool = KvPool(LAYOUT, num_pages=num_blocks)
        self._arena_SX = np.ones((num_blocks, LAYOUT.block_bytes), np.uint8)
        self._source_SX = np.ones_like(self._arena_SX)
        shuffled = np.random.default_rng(0).permuted([range(num_blocks)] * 2, axis=1)
        self._chunks = [
            (shuffled[0, start : start + CHUNK_BLOCKS].tolist(), shuffled[1, start : start + CHUNK_BLOCKS].tolist())
            for start in range(0, num_blocks, CHUNK_BLOCKS)
        ]  # fmt: skip
        self._pool.write(layer=0, page_ids=[0], data=memoryview(bytes(LAYOUT.layer_block_bytes)))

    def save(self) -> float:
        """GB/s, as all of these."""
        return self._gb_s(lambda pages, slots: self._pool.save(pages, self._arena_SX, slots))

    def load(self) -> float:
        return self._gb_s(lambda pages, slots: self._pool.load(pages, self._arena_SX, slots))

    def memcpy(self) -> float:
        started_s = time.perf_counter()
        for start in range(0, len(self._arena_SX), CHUNK_BLOCKS):
            np.copyto(
                self._arena_SX[start : start + CHUNK_BLOCKS], self._source_SX[start : start + CHUNK_BLOCKS]
            )
        return self._arena_SX.nbytes / (time.perf_counter() - started_s) / 1e9

    def _gb_s(self, copy: Callable[[list[int], list[int]], None]) -> float:
        started_s = time.perf_counter()
        for pages, slots in self._chunks:
            copy(pages, slots)
        return self._arena_SX.nbytes / (time.perf_counter() - started_s) / 1e9


def measure_disk(*, num_blocks: int, repeats: int) -> float:
    """Prints a line for each size of run; the lower of the ratios of writing and reading chunks."""
    print(
        f"{'disk, MB/s':24} | {'write: tier':>20} {'bare':>20} {'ratio':>5} | {'read: tier':>20} {'bare':>20} ratio"
    )
    of_raw = 0.0
    for run_blocks in (1, 4, CHUNK_BLOCKS, 64):
        with tempfile.TemporaryDirectory(prefix="penstock-bench-") as directory:
            bench = DiskBench(Path(directory), run_blocks=run_blocks, num_blocks=num_blocks)
            found = alternate(
                {
                    "write": bench.write_tier,
                    "bare write": bench.write_file,
                    "bare read": bench.read_file,
                    "read": bench.read_tier,
                },
                repeats=repeats,
            )
        write, read = ratio(found, "write", "bare write"), ratio(found, "read", "bare read")
        name = f"{run_blocks} blocks, {run_blocks * LAYOUT.block_bytes // 1024} KiB"
        print(
            f"{name:24} | {spread(found['write']):>20} {spread(found['bare write']):>20} {write:5.2f} | "
            f"{spread(found['read']):>20} {spread(found['bare read']):>20} {read:5.2f}"
        )
        if run_blocks == CHUNK_BLOCKS:
            of_raw = min(write, read)
    return of_raw


def measure_copies(*, num_blocks: int, repeats: int) -> float:
    """The lower of the ratios of both directions."""
    bench = CopyBench(num_blocks=num_blocks)
    found = alternate({"save": bench.save, "load": bench.load, "memcpy": bench.memcpy}, repeats=repeats)
    save, load = ratio(found, "save", "memcpy"), ratio(found, "load", "memcpy")
    print(f"pages to arena {spread(found['save'])} GB/s, {save:.2f} of memcpy ({spread(found['memcpy'])})")
    print(f"arena to pages {spread(found['load'])} GB/s, {load:.2f} of memcpy")
    return min(save, load)


def alternate(measured: Mapping[str, Callable[[], float]], *, repeats: int) -> dict[str, list[float]]:
    """All in turn, so that other load on the machine meets all of them; the first turn warms up."""
    turns = [{name: measure() for name, measure in measured.items()} for _ in range(repeats + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in measured}


def ratio(found: Mapping[str, Sequence[float]], ours: str, theirs: str) -> float:
    """The median over the turns: what slows a turn slows both sides of it."""
    return statistics.median(our / their for our, their in zip(found[ours], found[theirs], strict=True))


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g}-{max(values):.4g})"


def _runs(run_blocks: int, num_blocks: int) -> list[BlockRun]:
    """One chain, in runs."""
    keys = [BlockKey(number.to_bytes(16, "little")) for number in range(1, num_blocks + 1)]
    chain = BlockRun(root=ROOT, parent=ROOT, first_position=0, keys=tuple(keys))
    return [chain.part(start, start + run_blocks) for start in range(0, num_blocks, run_blocks)]


def _forget_cached(paths: Iterable[Path]) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _sync(paths: Iterable[Path]) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="finish within a minute; noisier")
    quick = parser.parse_args().quick
    ssd_of_raw = measure_disk(num_blocks=2048 if quick else 4096, repeats=3 if quick else 9)
    cpu_of_memcpy = measure_copies(num_blocks=1024, repeats=15 if quick else 50)
    restarts_s = [measure_restart() for _ in range(1 if quick else 3)]
    if not quick:
        measure_turns()
    write_report(
        "kv_tiers",
        [
            Claim(name="ssd_of_raw", value=ssd_of_raw, unit="x", aim=0.7, better="higher"),
            Claim(name="cpu_of_memcpy", value=cpu_of_memcpy, unit="x", aim=0.7, better="higher"),
            Claim(
                name="warm_restart_s", value=statistics.median(restarts_s), unit="s", aim=2, better="lower"
            ),
        ],
        keep=not quick,
    )


if __name__ == "__main__":
    main()
