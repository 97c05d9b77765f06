"""Chunks that were encoded, kept for who asks for the same next: bounded in bytes, the least recently used go first.

Encoding passes fewer values a second than a fast link, and a context that one puller wants others want too. What is
coded is a few bits a value: a sixteenth of a tier's bytes holds about as many tokens as the tier.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Self

from kvstore.blocks import BlockKey


@dataclass(frozen=True, slots=True)
class ChunkId:
    """Which blocks, at which level. Of all their keys: in a chain the last one says all, but peers may name any blocks
    together, and whoever wants the chain must not get those."""

    digest: bytes
    level: int

    @classmethod
    def of(cls, keys: Sequence[BlockKey], *, level: int) -> Self:
        return cls(blake2b(b"".join(keys), digest_size=16).digest(), level)


class CodedChunks:
    """Of one codec. `put` takes the `edition` from before the blocks were read: what was dropped since stays away."""

    def __init__(self, *, capacity_bytes: int) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes must not be negative, got {capacity_bytes}")
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self.edition = 0
        self._chunks: OrderedDict[ChunkId, bytes] = OrderedDict()  # the next to go comes first

    def __len__(self) -> int:
        return len(self._chunks)

    def get(self, chunk_id: ChunkId) -> bytes | None:
        """Counts as a use."""
        chunk = self._chunks.get(chunk_id)
        if chunk is not None:
            self._chunks.move_to_end(chunk_id)
        return chunk

    def put(self, chunk_id: ChunkId, chunk: bytes, *, edition: int) -> None:
        """Not kept: what is dropped by now, or larger than all that may be kept."""
        if edition != self.edition or chunk_id in self._chunks or len(chunk) > self.capacity_bytes:
            return
        while self.num_bytes + len(chunk) > self.capacity_bytes:
            _, oldest = self._chunks.popitem(last=False)
            self.num_bytes -= len(oldest)
        self._chunks[chunk_id] = chunk
        self.num_bytes += len(chunk)

    def drop(self) -> None:
        """All of it, whosever it is: nothing here says which root a chunk is of, and it is soon encoded again."""
        self._chunks.clear()
        self.num_bytes = 0
        self.edition += 1

    def check(self) -> None:
        assert self.num_bytes == sum(map(len, self._chunks.values())) <= self.capacity_bytes
