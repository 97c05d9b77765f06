"""The KV codec on the shipped model: how small, how lossy, how fast, how near to the entropy.

    make bench BENCH=kv_codec [ARGS=--quick]

KV of held-out text and of the recall task, in chunks of 256 tokens, at every level of CacheGen with the model's profile
(which was made from other text) and, as "no profile", with tables that each chunk brings; beside them 8 bits a value,
KIVI's 4 and 2 bits, and zstandard on CacheGen's symbols. Sizes are whole chunks, headers included. "8-bit" is 8 bits a
value, without the scales that a real one needs. One thread; speeds are medians over the chunks of text.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import zstandard

from bench.kv_quality import Model, Sample
from bench.report import Claim, write_report
from kvstore.codec.codec import KvCodec
from kvstore.codec.entropy import count_symbols
from kvstore.codec.levels import NUM_CACHEGEN_LEVELS
from kvstore.codec.profile import KvProfile, load_profile
from kvstore.codec.quantize import NUM_SYMBOLS, Bytes, dequantize_, quantize
from kvstore.layout import ITEM_BYTES, KvLayout
from workers.model.checkpoint import PROFILE_FILE

MODEL = Path(__file__).resolve().parent.parent / "models" / "demo"
CHUNK_BLOCKS = 16
MAX_PERPLEXITY_RISE, MAX_RECALL_DROP = 2.0, 2.0  # % and points: what a level may cost to be claimed


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """How much to measure."""

    num_texts: int
    num_recalls: int
    recall_tokens: tuple[int, ...]


FULL = Extent(num_texts=80, num_recalls=50, recall_tokens=(512, 1024, 2048))
QUICK = Extent(num_texts=12, num_recalls=12, recall_tokens=(512,))


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Bits per value of text and of recall, and million values a second on text."""

    text_bits: float
    recall_bits: float
    encode_msym_s: float
    decode_msym_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    perplexity_rise: float  # %
    recall_drop: float  # points


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    level: int
    name: str
    size: Size
    quality: Quality


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="within a minute, for a first look")
    extent = QUICK if parser.parse_args().quick else FULL
    torch.set_num_threads(1)
    model = Model(MODEL)
    layout = model.info.layout
    known = load_profile(MODEL / PROFILE_FILE, fingerprint=model.info.fingerprint, layout=layout)
    if known is None:
        raise SystemExit(f"{MODEL / PROFILE_FILE} is missing: penstock profile-kv makes it")
    texts = model.text_samples(num_samples=extent.num_texts)
    recalls = [
        sample
        for num_tokens in extent.recall_tokens
        for sample in model.recall_samples(num_tokens=num_tokens, num_samples=extent.num_recalls)
    ]
    profiled, bare = KvCodec(layout, profile=known), KvCodec(layout, profile=None)
    judge = Judge(model, texts, recalls)
    print(f"{len(texts)} texts and {len(recalls)} recalls; exact: {judge.exact}\n")
    print(_HEAD)
    rows = [judge.row(profiled, level.number, level.name) for level in profiled.levels[1:]]
    for level in profiled.levels[1 : NUM_CACHEGEN_LEVELS + 1]:
        judge.row(bare, level.number, f"{level.name} no profile")
    over = compare_with_entropy(known, layout, texts, recalls, rows)
    write_report("kv_codec", claims(rows, over), keep=extent is FULL)


_HEAD = (
    f"{'':24}{'bits text':>10}{'recall':>8}{'of 8-bit':>10}{'of fp16':>9}{'perplexity':>12}{'recall':>9}"
    f"{'encode':>10}{'decode':>8} Msym/s{'encode':>9}{'decode':>8} MB/s"
)


class Judge:
    """Measures a codec's levels on the same samples."""

    def __init__(self, model: Model, texts: Sequence[Sample], recalls: Sequence[Sample]) -> None:
        self._model, self._texts, self._recalls = model, texts, recalls
        self._loss = model.text_loss(texts, lambda *_: None)
        self._recall = model.recall(recalls, lambda *_: None)
        self.exact = f"perplexity {math.exp(self._loss):.2f}, recall {100 * self._recall:.1f} %"

    def row(self, codec: KvCodec, level: int, name: str) -> Row:
        def distort(arena_SX: Bytes, slots: range) -> None:
            for chunk in chunks_of(slots):
                codec.decode(codec.encode(arena_SX, chunk, level=level), arena_SX, chunk)

        loss = self._model.text_loss(self._texts, distort)
        recall = self._model.recall(self._recalls, distort)
        quality = Quality(
            perplexity_rise=100 * (math.exp(loss - self._loss) - 1),
            recall_drop=round(100 * (self._recall - recall), 6),
        )
        size = measure(codec, level, self._texts, self._recalls)
        row = Row(level=level, name=name, size=size, quality=quality)
        _print(row, ITEM_BYTES[codec.layout.dtype])
        return row


def chunks_of(slots: range) -> list[range]:
    return [slots[start : start + CHUNK_BLOCKS] for start in range(0, len(slots), CHUNK_BLOCKS)]


def measure(codec: KvCodec, level: int, texts: Sequence[Sample], recalls: Sequence[Sample]) -> Size:
    encode_s, decode_s = [], []
    num_bytes = num_values = 0
    for sample in texts:
        out = np.empty_like(sample.blocks)
        for slots in chunks_of(range(len(sample.blocks))):
            start_s = time.perf_counter()
            data = codec.encode(sample.blocks, slots, level=level)
            encoded_s = time.perf_counter()
            codec.decode(data, out, slots)
            values = values_of(codec.layout, slots)
            encode_s.append((encoded_s - start_s) / values)
            decode_s.append((time.perf_counter() - encoded_s) / values)
            num_bytes, num_values = num_bytes + len(data), num_values + values
    recall_chunks = [(sample, slots) for sample in recalls for slots in chunks_of(range(len(sample.blocks)))]
    recall_bytes = sum(
        len(codec.encode(sample.blocks, slots, level=level)) for sample, slots in recall_chunks
    )
    recall_values = sum(values_of(codec.layout, slots) for _, slots in recall_chunks)
    return Size(
        text_bits=8 * num_bytes / num_values,
        recall_bits=8 * recall_bytes / recall_values,
        encode_msym_s=1e-6 / statistics.median(encode_s),
        decode_msym_s=1e-6 / statistics.median(decode_s),
    )


def values_of(layout: KvLayout, slots: range) -> int:
    return len(slots) * layout.block_bytes // ITEM_BYTES[layout.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class SymbolBits:
    """How often each symbol is in each channel's anchors and deltas, and what zstandard makes of a symbol."""

    counts_KRS: npt.NDArray[np.int64]
    zstd: float


def compare_with_entropy(
    known: KvProfile,
    layout: KvLayout,
    texts: Sequence[Sample],
    recalls: Sequence[Sample],
    rows: Sequence[Row],
) -> dict[int, float]:
    """How many % the chunks of each level exceed the entropy of what is in them, of text and recall together.

    That is the entropy of the measured symbols themselves, of each channel's anchors and deltas apart: no coder with
    one distribution each could do better.
    """
    over = {}
    print(f"\n{'symbols of text / recall':28}{'entropy':>16}{'coded':>16}{'zstd -1':>16}   bits per value")
    for row in rows[:NUM_CACHEGEN_LEVELS]:
        parts = [symbol_bits(known, layout, row.level, samples) for samples in (texts, recalls)]
        coded = (row.size.text_bits, row.size.recall_bits)
        num_values = [part.counts_KRS.sum() for part in parts]
        coded_bits = float(np.dot(coded, num_values))
        over[row.level] = 100 * (coded_bits / entropy_bits(parts[0].counts_KRS + parts[1].counts_KRS) - 1)
        entropies = [entropy_bits(part.counts_KRS) / int(part.counts_KRS.sum()) for part in parts]
        columns = (entropies, coded, [part.zstd for part in parts])
        print(
            f"{row.name:28}"
            + "".join(f"{one[0]:8.3f} /{one[1]:6.3f}" for one in columns)
            + f"   together {over[row.level]:.1f} % over"
        )
    return over


def symbol_bits(known: KvProfile, layout: KvLayout, level: int, samples: Sequence[Sample]) -> SymbolBits:
    """Ends the bench if symbols do not come back from a chunk exactly."""
    codec, bins = KvCodec(layout, profile=known), known.levels[level - 1].bins
    counts = np.zeros((2, bins.mean_GC.size, NUM_SYMBOLS), np.int64)
    zstd_bytes = 0
    for sample in samples:
        decoded, expected = np.zeros_like(sample.blocks), np.zeros_like(sample.blocks)
        for slots in chunks_of(range(len(sample.blocks))):
            symbols = quantize(sample.blocks, slots, bins, layout=layout)
            dequantize_(expected, slots, symbols, bins, layout=layout)
            codec.decode(codec.encode(sample.blocks, slots, level=level), decoded, slots)
            for number, kind in enumerate(symbols):
                counts[number] += count_symbols(kind, num_symbols=NUM_SYMBOLS)
                zstd_bytes += len(zstandard.compress(kind.transpose(0, 2, 1).tobytes(), level=1))
        if not np.array_equal(decoded, expected):
            raise SystemExit(f"level {level}: symbols of a chunk did not come back as they were")
    return SymbolBits(counts_KRS=counts, zstd=8 * zstd_bytes / int(counts.sum()))


def entropy_bits(counts: npt.NDArray[np.int64]) -> float:
    """Of all symbols together; the last axis is a distribution."""
    shares = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return float(-(counts * np.log2(np.where(shares > 0, shares, 1))).sum())


def claims(rows: Sequence[Row], over: dict[int, float]) -> list[Claim]:
    """Of the smallest level of CacheGen within the bounds of quality; of level 1 if none is."""
    ours = rows[:NUM_CACHEGEN_LEVELS]
    good = [
        row
        for row in ours
        if row.quality.perplexity_rise <= MAX_PERPLEXITY_RISE and row.quality.recall_drop <= MAX_RECALL_DROP
    ]
    best = min(good, key=lambda row: row.size.text_bits) if good else ours[0]
    print(f"\nclaimed: {best.name}")
    size, quality = best.size, best.quality
    vs_8bit = 8 / max(size.text_bits, size.recall_bits)
    return [
        Claim(name="size_vs_8bit", value=vs_8bit, unit="x", aim=3.5, better="higher"),
        Claim(name="perplexity_rise", value=quality.perplexity_rise, unit="%", aim=2, better="lower"),
        Claim(name="recall_drop", value=quality.recall_drop, unit="points", aim=2, better="lower"),
        Claim(name="over_entropy", value=over[best.level], unit="%", aim=2, better="lower"),
        Claim(name="encode_msym_s", value=size.encode_msym_s, unit="M/s", aim=100, better="higher"),
        Claim(name="decode_msym_s", value=size.decode_msym_s, unit="M/s", aim=200, better="higher"),
    ]


def _print(row: Row, item_bytes: int) -> None:
    size, quality = row.size, row.quality
    bits, encode, decode = size.text_bits, size.encode_msym_s, size.decode_msym_s
    print(
        f"{row.name:24}{bits:10.3f}{size.recall_bits:8.3f}{8 / bits:9.2f}x{16 / bits:8.2f}x"
        f"{quality.perplexity_rise:+11.2f}%{-quality.recall_drop:+9.1f}"
        f"{encode:10.0f}{decode:8.0f}{encode * item_bytes:16.0f}{decode * item_bytes:8.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
