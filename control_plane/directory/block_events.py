"""What a worker tells about its blocks: digests side by side, as they travel; see directory.proto."""

from collections.abc import Iterator
from dataclasses import dataclass

from kvstore.blocks import DIGEST_BYTES
from kvstore.tiers.tier import Tier

ANNOUNCED_TIERS = (Tier.DEVICE, Tier.MEMORY, Tier.DISK)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockEvents:
    """What became held and what is gone since the last acknowledged events.

    `stored_tiers` has a byte for each digest of `stored`, or none at all: then all are in device pages. Raises
    ValueError with the offending value.
    """

    sequence: int
    snapshot: bool = False
    stored: bytes = b""
    stored_tiers: bytes = b""
    removed: bytes = b""

    def __post_init__(self) -> None:
        for name, digests in (("stored", self.stored), ("removed", self.removed)):
            if len(digests) % DIGEST_BYTES:
                raise ValueError(
                    f"{name} must hold digests of {DIGEST_BYTES} bytes, got {len(digests)} bytes"
                )
        if self.stored_tiers and len(self.stored_tiers) != self.num_stored:
            raise ValueError(
                f"stored_tiers must have a byte for each of the {self.num_stored} blocks of stored, or none, "
                f"got {len(self.stored_tiers)}"
            )
        slowest = max(self.stored_tiers, default=0)
        if slowest > max(ANNOUNCED_TIERS):
            known = ", ".join(f"{tier.value} ({tier.name.lower()})" for tier in ANNOUNCED_TIERS)
            raise ValueError(f"a tier in stored_tiers must be one of {known}, got {slowest}")

    @property
    def num_stored(self) -> int:
        return len(self.stored) // DIGEST_BYTES

    def parts(self, max_blocks: int) -> Iterator["BlockEvents"]:
        """The same in pieces of at most so many stored and so many removed blocks, in an order that can be applied.

        They share the sequence number, so whoever has applied some may be given all again.
        """
        step = max_blocks * DIGEST_BYTES
        num_parts = max(1, -(-max(len(self.stored), len(self.removed)) // step))
        for number in range(num_parts):
            digests = slice(number * step, (number + 1) * step)
            yield BlockEvents(
                sequence=self.sequence,
                snapshot=self.snapshot and number == 0,
                stored=self.stored[digests],
                stored_tiers=self.stored_tiers[number * max_blocks : (number + 1) * max_blocks],
                removed=self.removed[digests],
            )
