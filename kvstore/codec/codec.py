"""Chunks of blocks to bytes and back, at any level. Stateless once made; threads may share it."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore.codec.format import ChunkHeader, Section, pack_chunk, unpack_chunk
from kvstore.codec.levels import Level, list_levels
from kvstore.codec.profile import KvProfile
from kvstore.errors import CodecCorrupted
from kvstore.layout import KvLayout

Arena = npt.NDArray[np.uint8]  # [slots, block_bytes]


class KvCodec:
    """Codes the KV of one layout: with its model's profile, else with tables that each chunk brings along."""

    def __init__(self, layout: KvLayout, *, profile: KvProfile | None) -> None:
        self.layout = layout
        self.profile_id = profile.digest if profile else b""
        self.levels: tuple[Level, ...] = list_levels(
            layout, cachegen_bits=profile.bits_per_level if profile else None
        )

    def encode(self, arena_SX: Arena, slots: Sequence[int], *, level: int) -> bytes:
        """One chunk of the consecutive blocks in `slots`, which decodes without any other chunk."""
        if not 0 <= level < len(self.levels):
            raise ValueError(f"level must be in 0..{len(self.levels) - 1}, got {level}")
        header = ChunkHeader(level=level, num_blocks=len(slots), layout=self.layout)
        return pack_chunk(header, {Section.VALUES: arena_SX[list(slots)].tobytes()})

    def decode(self, data: bytes | bytearray | memoryview, arena_SX: Arena, slots: Sequence[int]) -> None:
        """Fills all of `slots`, or none: CodecCorrupted if `data` is not a whole chunk of that many blocks.

        Raises ProfileMismatch if it was coded with another profile.
        """
        chunk = unpack_chunk(data, layout=self.layout, num_blocks=len(slots), profile_id=self.profile_id)
        values = chunk.section(Section.VALUES)
        if len(values) != len(slots) * self.layout.block_bytes:
            raise CodecCorrupted(
                f"{len(values)} bytes of {len(slots)} blocks, each has {self.layout.block_bytes}"
            )
        arena_SX[list(slots)] = np.frombuffer(values, np.uint8).reshape(len(slots), -1)
