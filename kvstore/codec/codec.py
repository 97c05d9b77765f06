"""Chunks of blocks to bytes and back, at any level. Stateless once made; threads may share it.

Blocks are read from and written to slots of any memory that `quantize.py` knows.

On one core (AMD EPYC, Zen 5) quantising passes 1600 million values a second and the way back 3800, several times what
the entropy coder does, so a chunk is not split further.
"""

from collections.abc import Sequence

import numpy as np

from kvstore.codec.adaptive import decode_adaptive, encode_adaptive
from kvstore.codec.comparisons import Sections, decode_int8, decode_kivi, encode_int8, encode_kivi
from kvstore.codec.entropy import decode_symbols, encode_symbols
from kvstore.codec.finite import is_finite
from kvstore.codec.format import Chunk, ChunkHeader, Section, pack_chunk, unpack_chunk
from kvstore.codec.levels import INT8, KIVI2, KIVI4, NUM_CACHEGEN_LEVELS, RAW, Level, list_levels
from kvstore.codec.profile import KvProfile
from kvstore.codec.quantize import (
    Bins,
    Bytes,
    Floats,
    dequantize_,
    make_room,
    num_groups,
    quantize,
    read_values,
    write_blocks_,
    write_values_,
)
from kvstore.errors import CodecCorrupted
from kvstore.layout import KvLayout

_KIVI_BITS = {KIVI4: 4, KIVI2: 2}


class KvCodec:
    """Codes the KV of one layout: with its model's profile, else with tables that each chunk brings along."""

    def __init__(self, layout: KvLayout, *, profile: KvProfile | None) -> None:
        self.layout = layout
        self.profile_id = profile.digest if profile else b""
        self.levels: tuple[Level, ...] = list_levels(
            layout, cachegen_bits=profile.bits_per_level if profile else None
        )
        self._profile = profile

    def encode(self, memory: Bytes, slots: Sequence[int], *, level: int) -> bytes:
        """One chunk of the consecutive blocks in `slots`, which decodes without any other chunk."""
        if not 0 <= level < len(self.levels):
            raise ValueError(f"level must be in 0..{len(self.levels) - 1}, got {level}")
        is_profiled = 1 <= level <= NUM_CACHEGEN_LEVELS and self._profile is not None
        header = ChunkHeader(
            level=level,
            num_blocks=len(slots),
            layout=self.layout,
            profile_id=self.profile_id if is_profiled else b"",
        )
        return pack_chunk(header, self._encode(memory, slots, level))

    def decode(self, data: bytes | bytearray | memoryview, memory: Bytes, slots: Sequence[int]) -> None:
        """Fills all of `slots`, or none: CodecCorrupted if `data` is not a whole chunk of that many blocks.

        Raises ProfileMismatch if it was coded with another profile.
        """
        chunk = unpack_chunk(data, layout=self.layout, num_blocks=len(slots), profile_id=self.profile_id)
        level = chunk.header.level
        if level >= len(self.levels):
            raise CodecCorrupted(
                f"a chunk of level {level}, known of {self.layout.dtype} are 0 to {len(self.levels) - 1}"
            )
        if level == RAW:
            write_blocks_(memory, slots, self._raw_blocks(chunk), layout=self.layout)
        elif level <= NUM_CACHEGEN_LEVELS:
            symbols, bins = (
                self._decode_profiled(chunk)
                if chunk.header.profile_id
                else decode_adaptive(chunk, layout=self.layout)
            )
            dequantize_(memory, slots, symbols, bins, layout=self.layout)
        else:
            values_GTC = self._decode_compared(chunk)
            write_values_(memory, slots, values_GTC, layout=self.layout)

    def _encode(self, memory: Bytes, slots: Sequence[int], level: int) -> Sections:
        if level == RAW:
            return {Section.VALUES: memory[list(slots)].tobytes()}
        if level > NUM_CACHEGEN_LEVELS:
            values_GTC = read_values(memory, slots, layout=self.layout)
            if level == INT8:
                return encode_int8(values_GTC)
            return encode_kivi(values_GTC, num_heads=self.layout.num_kv_heads, num_bits=_KIVI_BITS[level])
        if self._profile is None:
            return encode_adaptive(memory, slots, level=level, layout=self.layout)
        known = self._profile.levels[level - 1]
        anchors, deltas = quantize(memory, slots, known.bins, layout=self.layout)
        return {
            Section.ANCHORS: encode_symbols(anchors, known.anchor_tables),
            Section.DELTAS: encode_symbols(deltas, known.delta_tables),
        }

    def _raw_blocks(self, chunk: Chunk) -> Bytes:
        values, num_blocks = chunk.section(Section.VALUES), chunk.header.num_blocks
        if len(values) != num_blocks * self.layout.block_bytes:
            raise CodecCorrupted(
                f"{len(values)} bytes of {num_blocks} blocks, each has {self.layout.block_bytes}"
            )
        blocks = np.frombuffer(values, np.uint8).reshape(num_blocks, -1)
        if not is_finite(blocks, layout=self.layout):  # whatever level was asked for, this is what came
            raise CodecCorrupted(f"{num_blocks} blocks of level {RAW} hold what is no number")
        return blocks

    def _decode_profiled(self, chunk: Chunk) -> tuple[tuple[Bytes, Bytes], Bins]:
        assert self._profile is not None  # the container refuses a profile that is not ours
        known = self._profile.levels[chunk.header.level - 1]
        anchors, deltas = make_room(self.layout, num_blocks=chunk.header.num_blocks)
        decode_symbols(chunk.section(Section.ANCHORS), known.anchor_tables, out=anchors)
        decode_symbols(chunk.section(Section.DELTAS), known.delta_tables, out=deltas)
        return (anchors, deltas), known.bins

    def _decode_compared(self, chunk: Chunk) -> Floats:
        level, num_tokens = chunk.header.level, chunk.header.num_blocks * self.layout.block_size_tokens
        shape = (num_groups(self.layout), num_tokens, self.layout.head_dim)
        values, scales = chunk.section(Section.VALUES), chunk.section(Section.SCALES)
        if level == INT8:
            return decode_int8(values, scales, shape=shape)
        heads, num_bits = self.layout.num_kv_heads, _KIVI_BITS[level]
        return decode_kivi(values, scales, shape=shape, num_heads=heads, num_bits=num_bits)
