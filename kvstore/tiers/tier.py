"""The tiers, fastest first, the unit that moves between them, and how a tier describes itself."""

from dataclasses import dataclass
from enum import IntEnum

from kvstore.blocks import BlockKey


class Tier(IntEnum):
    """The numbers are on the wire (directory.proto, kv.proto)."""

    DEVICE = 0  # pages of the engine
    MEMORY = 1  # the CPU's
    DISK = 2
    PEER = 3  # another worker or a store; never announced


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockRun:
    """Consecutive blocks of one chain, and where they are in it.

    `parent` is the key before the first one: the chain's `root` (model, adapter and tenant) if `first_position`,
    the number of blocks before them, is 0.
    """

    root: BlockKey
    parent: BlockKey
    first_position: int
    keys: tuple[BlockKey, ...]

    def __post_init__(self) -> None:
        if self.first_position < 0 or not self.keys:
            raise ValueError(
                f"a run has blocks and begins at 0 or later, got {len(self.keys)} from {self.first_position}"
            )

    def part(self, start: int, stop: int) -> "BlockRun":
        """Blocks start..stop-1 of this run."""
        if stop - start == len(self.keys):
            return self
        return BlockRun(
            root=self.root,
            parent=self.parent if start == 0 else self.keys[start - 1],
            first_position=self.first_position + start,
            keys=self.keys[start:stop],
        )

    def extended(self, keys: tuple[BlockKey, ...]) -> "BlockRun":
        """This run and the blocks that continue it."""
        return BlockRun(
            root=self.root,
            parent=self.parent,
            first_position=self.first_position,
            keys=self.keys + keys,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TierStats:
    """What a tier holds now, and what happened to it since the start."""

    num_blocks: int
    capacity_blocks: int
    used_bytes: int
    capacity_bytes: int
    num_hit_blocks: int
    num_stored_blocks: int
    num_evicted_blocks: int
    num_errors: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldPrefix:
    """A chain from its root to a block where it ends, or where several go on from."""

    root: BlockKey
    last_key: BlockKey
    num_blocks: int
    age_s: float
    idle_s: float
    num_hits: int
