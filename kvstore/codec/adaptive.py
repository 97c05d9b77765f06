"""CacheGen without a profile: a chunk brings what it needs to be decoded, its own bins and pooled distributions.

The section of scales, compressed with zstandard: the root mean square of each layer's keys and values (float32), then
per channel the mean (float16), alpha in sixteenths and how much wider than usual the bins are (a byte each).
"""

from collections.abc import Sequence

import numpy as np
import zstandard

from kvstore.codec.channels import KvStatistics, make_bins
from kvstore.codec.comparisons import Sections
from kvstore.codec.entropy import SymbolTables, decode_symbols, encode_symbols
from kvstore.codec.format import Chunk, Section
from kvstore.codec.pooled_tables import pack_tables, pool_tables, unpack_tables
from kvstore.codec.quantize import NUM_SYMBOLS, Bins, Bytes, make_room, num_groups, quantize, read_values
from kvstore.errors import CodecCorrupted
from kvstore.layout import KvLayout

_ALPHA_STEPS = 16
_MOST_HALF = 65504.0


def encode_adaptive(memory: Bytes, slots: Sequence[int], *, level: int, layout: KvLayout) -> Sections:
    known = KvStatistics.of([read_values(memory, slots, layout=layout)], layout=layout)
    packed = b"".join((
        known.scale_L2.astype("<f4").tobytes(),
        np.clip(known.mean_GC, -_MOST_HALF, _MOST_HALF).astype("<f2").tobytes(),
        np.rint(known.alpha_GC * _ALPHA_STEPS).astype(np.uint8).tobytes(),
        known.widening_GC(level=level).tobytes(),
    ))  # fmt: skip
    anchors, deltas = quantize(memory, slots, _unpack(packed, level=level, layout=layout), layout=layout)
    found = [pool_tables(symbols, num_symbols=NUM_SYMBOLS) for symbols in (anchors, deltas)]
    return {
        Section.SCALES: zstandard.compress(packed),
        Section.ANCHOR_TABLES: pack_tables(found[0]),
        Section.DELTA_TABLES: pack_tables(found[1]),
        Section.ANCHORS: encode_symbols(anchors, found[0]),
        Section.DELTAS: encode_symbols(deltas, found[1]),
    }


def decode_adaptive(chunk: Chunk, *, layout: KvLayout) -> tuple[tuple[Bytes, Bytes], Bins]:
    """The symbols of the anchors and the deltas, and the bins that they mean. Raises CodecCorrupted."""
    expected_bytes = 8 * layout.num_layers + 4 * num_groups(layout) * layout.head_dim
    scales = chunk.section(Section.SCALES)
    try:
        announced = zstandard.frame_content_size(scales)
        if announced != expected_bytes:  # decompress() allocates what a frame announces
            raise CodecCorrupted(f"{announced} bytes of scales, expected {expected_bytes}")
        packed = zstandard.decompress(scales)
    except zstandard.ZstdError as e:
        raise CodecCorrupted(f"the scales of a chunk: {e}") from e
    with np.errstate(over="ignore", invalid="ignore"):
        bins = _unpack(packed, level=chunk.header.level, layout=layout)
    if not (np.isfinite(bins.mean_GC).all() and np.isfinite(bins.delta_bin_GC).all()):
        raise CodecCorrupted("scales of a chunk that are not finite")
    anchors, deltas = make_room(layout, num_blocks=chunk.header.num_blocks)
    decode_symbols(chunk.section(Section.ANCHORS), _tables(chunk, Section.ANCHOR_TABLES, layout), out=anchors)
    decode_symbols(chunk.section(Section.DELTAS), _tables(chunk, Section.DELTA_TABLES, layout), out=deltas)
    return (anchors, deltas), bins


def _unpack(packed: bytes, *, level: int, layout: KvLayout) -> Bins:
    shape = (num_groups(layout), layout.head_dim)
    scale_bytes, num_channels = 8 * layout.num_layers, shape[0] * shape[1]
    mean = np.frombuffer(packed, "<f2", count=num_channels, offset=scale_bytes)
    bytes_2GC = np.frombuffer(packed, np.uint8, offset=scale_bytes + 2 * num_channels).reshape(2, *shape)
    known = KvStatistics(
        mean_GC=mean.astype(np.float32).reshape(shape),
        alpha_GC=bytes_2GC[0].astype(np.float32) / np.float32(_ALPHA_STEPS),
        reach_GC=np.zeros(shape, np.float32),
        scale_L2=np.frombuffer(packed, "<f4", count=2 * layout.num_layers).reshape(-1, 2).astype(np.float32),
    )
    return make_bins(known, bytes_2GC[1], level=level)


def _tables(chunk: Chunk, kind: Section, layout: KvLayout) -> SymbolTables:
    tables = unpack_tables(chunk.section(kind), num_rows=num_groups(layout) * layout.head_dim)
    if tables.num_symbols != NUM_SYMBOLS:
        raise CodecCorrupted(f"tables of {tables.num_symbols} symbols, must be {NUM_SYMBOLS}")
    return tables
