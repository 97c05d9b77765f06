"""How much of a prompt somebody holds, and in which tiers."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """The leading blocks of a prompt that one worker or store holds without a hole, by its fastest tier of each."""

    num_device_blocks: int = 0
    num_memory_blocks: int = 0
    num_disk_blocks: int = 0

    @property
    def num_blocks(self) -> int:
        return self.num_device_blocks + self.num_memory_blocks + self.num_disk_blocks


NO_OVERLAP = Overlap()
