"""What the index of a tier takes in RAM, beside the bytes of the blocks.

    python -m bench.kv_index [--quick]

Blocks of 64 bytes, so that the index is all there is; runs of 16 in chains of 256, as prompts of 4,096 tokens leave
them. Counted by tracemalloc, which sees the memory of Python and of numpy.
"""

import argparse
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import Claim, write_report
from kvstore.blocks import BlockKey
from kvstore.holdings import Holdings
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_settings import DiskSettings
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.tier import BlockRun

BLOCK_BYTES = 64
RUN_BLOCKS, CHAIN_RUNS = 16, 16
DISK_BYTES_PER_BLOCK = 8192  # of capacity: each may have a record of its own, with a header
AIM_SLOT_BYTES, AIM_MEMORY_BYTES, AIM_DISK_BYTES = 128, 128, 512


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer blocks")
    quick = parser.parse_args().quick
    num_blocks = 2**14 if quick else 2**17
    slot_bytes, memory_bytes = measure_memory(num_blocks)
    with tempfile.TemporaryDirectory() as directory:
        _, disk_bytes = measure_disk(Path(directory), num_blocks)
    claims = [
        Claim(name="index_slot_bytes", value=slot_bytes, unit="bytes", aim=AIM_SLOT_BYTES, better="lower"),
        Claim(name="index_memory_block_bytes", value=memory_bytes, unit="bytes", aim=AIM_MEMORY_BYTES, better="lower"),
        Claim(name="index_disk_block_bytes", value=disk_bytes, unit="bytes", aim=AIM_DISK_BYTES, better="lower"),
    ]  # fmt: skip
    write_report("kv_index", claims, keep=not quick)


def measure_memory(num_blocks: int) -> tuple[float, float]:
    """Bytes a slot, and bytes a held block."""
    buffer = np.zeros(num_blocks * BLOCK_BYTES, dtype=np.uint8)
    holdings = Holdings()

    def fill(tier: MemoryTier) -> None:
        for run in runs(num_blocks):
            tier.commit(run, tier.reserve(len(run.keys)))
            holdings.take_changes(len(run.keys))  # as a heartbeat does

    return _measure(
        lambda: MemoryTier(buffer, block_bytes=BLOCK_BYTES, policy="cost", holdings=holdings), fill,
        num_slots=num_blocks, num_blocks=num_blocks,
    )  # fmt: skip


def measure_disk(directory: Path, num_blocks: int) -> tuple[float, float]:
    """The same, of the disk tier."""
    settings = DiskSettings(
        block_bytes=BLOCK_BYTES, capacity_bytes=num_blocks * DISK_BYTES_PER_BLOCK, namespace=b"bench"
    )
    block = np.zeros(BLOCK_BYTES, dtype=np.uint8)

    def fill(tier: DiskTier) -> None:
        for run in runs(num_blocks):
            tier.write(run, [block] * len(run.keys))

    return _measure(
        lambda: DiskTier.open(directory, settings=settings), fill,
        num_slots=settings.num_slots, num_blocks=num_blocks,
    )  # fmt: skip


def _measure(
    make: Callable[[], Any], fill: Callable[[Any], None], *, num_slots: int, num_blocks: int
) -> tuple[float, float]:
    tracemalloc.start()
    tier = make()
    empty_bytes, _ = tracemalloc.get_traced_memory()
    fill(tier)
    full_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return empty_bytes / num_slots, (full_bytes - empty_bytes) / num_blocks


def runs(num_blocks: int) -> Iterator[BlockRun]:
    """Of different chains. Their keys are new: what the index keeps of them counts."""
    for prompt in range(num_blocks // (RUN_BLOCKS * CHAIN_RUNS)):
        parent = root = BlockKey(prompt.to_bytes(16, "big"))
        for position in range(0, RUN_BLOCKS * CHAIN_RUNS, RUN_BLOCKS):
            keys = tuple(
                BlockKey((((prompt + 1) << 32) + position + number).to_bytes(16, "little"))
                for number in range(RUN_BLOCKS)
            )
            yield BlockRun(root=root, parent=parent, first_position=position, keys=keys)
            parent = keys[-1]


if __name__ == "__main__":
    main()
