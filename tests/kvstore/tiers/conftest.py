"""A directory for a disk tier, chains of blocks to keep in it, and proof that no file stays open."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore.blocks import BlockKey, child_key, root_key
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_settings import DiskSettings
from kvstore.tiers.tier import BlockRun

BLOCK_BYTES = 4096
CAPACITY_BYTES = 64 * BLOCK_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """Consecutive blocks and their bytes."""

    run: BlockRun
    blocks: NDArray[np.uint8]

    def part(self, start: int, stop: int) -> "Chain":
        return Chain(run=self.run.part(start, stop), blocks=self.blocks[start:stop])


class Disk:
    """Opens tiers in one directory, and closes them in the end."""

    def __init__(self, directory: Path, tiers: contextlib.ExitStack) -> None:
        self.directory = directory
        self.settings = DiskSettings(
            block_bytes=BLOCK_BYTES, capacity_bytes=CAPACITY_BYTES, namespace=b"model"
        )
        self.now_s = 1000.0
        self._tiers = tiers
        self._seeds = itertools.count()

    def open(self, **changed: object) -> DiskTier:
        settings = replace(self.settings, **changed)  # type: ignore[arg-type]
        tier = DiskTier.open(self.directory, settings=settings, now_s=self._clock)
        self._tiers.callback(tier.close)
        return tier

    def _clock(self) -> float:
        return self.now_s

    def chain(self, num_blocks: int, *, salt: str = "") -> Chain:
        """A new one every time."""
        seed = next(self._seeds)
        root = root_key(model_fingerprint=b"model", cache_salt=salt)
        keys: list[BlockKey] = []
        for position in range(num_blocks):
            keys.append(child_key(keys[-1] if keys else root, [seed, position, *range(14)]))
        blocks = np.random.default_rng(seed).integers(0, 256, (num_blocks, BLOCK_BYTES), dtype=np.uint8)
        run = BlockRun(root=root, parent=root, first_position=0, keys=tuple(keys))
        return Chain(run=run, blocks=blocks)

    def write(self, tier: DiskTier, chain: Chain) -> None:
        """A second later than before."""
        self.now_s += 1
        tier.write(chain.run, list(chain.blocks))
        tier.check()
        self.check_size(tier)

    def read(self, tier: DiskTier, chain: Chain) -> int:
        """How many leading blocks came back; all of them as they were."""
        into = np.zeros_like(chain.blocks)
        num_read = tier.read(chain.run.keys, list(into))
        assert np.array_equal(into[:num_read], chain.blocks[:num_read])
        return num_read

    def check_size(self, tier: DiskTier) -> None:
        """What the directory takes from the disk is what the tier says, and within its capacity."""
        taken = sum(-(-os.stat(path).st_size // 4096) * 4096 for path in self.segments())
        assert taken + 4096 == tier.stats().used_bytes <= tier.stats().capacity_bytes

    def segments(self) -> list[Path]:
        return sorted(self.directory.glob("segment-*.kv"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with contextlib.ExitStack() as tiers:
        yield Disk(tmp_path / "kv", tiers)
    assert not open_files_below(tmp_path), "a file stayed open"


def open_files_below(directory: Path) -> list[str]:
    """Those of this process, deleted ones included. Others, of servers of earlier tests, may close at any time."""
    targets = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            targets.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [target for target in targets if target.startswith(f"{directory}/")]
