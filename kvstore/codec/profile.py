"""What was learnt of a model's KV beforehand, and is therefore not sent with every chunk: bins and distributions.

The file (safetensors) holds, per channel, `mean` and `alpha`, and for each CacheGen level n `bin.n` and the frequencies
`anchors.n` and `deltas.n`. Its metadata name the version, the model and the layout.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, numpy, safe_open

from kvstore.codec.channels import KvStatistics
from kvstore.codec.entropy import TOTAL_FREQUENCY, SymbolTables, count_symbols, fit_frequencies
from kvstore.codec.format import PROFILE_ID_BYTES
from kvstore.codec.levels import NUM_CACHEGEN_LEVELS
from kvstore.codec.quantize import NUM_SYMBOLS, Bins, Bytes, num_groups, quantize, read_values
from kvstore.errors import ProfileMismatch
from kvstore.layout import KvLayout

VERSION = "penstock-kv-profile-1"

Frequencies = npt.NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelProfile:
    """Of one CacheGen level."""

    bins: Bins
    anchor_tables: SymbolTables
    delta_tables: SymbolTables


@dataclass(frozen=True, kw_only=True, slots=True)
class KvProfile:
    """Of one model and layout. `digest` stands for all of it: chunks name the profile they need."""

    digest: bytes
    bits_per_level: tuple[float, ...]
    levels: tuple[LevelProfile, ...]


def load_profile(path: Path, *, fingerprint: bytes, layout: KvLayout) -> KvProfile | None:
    """None if there is no such file; ProfileMismatch if it is another model's, of another version or damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise ProfileMismatch(f"{path} is not a whole profile: {e}") from e
    for name, ours in _facts(fingerprint, layout).items():
        if metadata.get(name) != ours:
            raise ProfileMismatch(f"{path} is for {name} {metadata.get(name)}, this worker's is {ours}")
    try:
        return KvProfile(
            digest=_digest(metadata, tensors),
            bits_per_level=tuple(float(bits) for bits in json.loads(metadata["bits_per_level"])),
            levels=tuple(_level(tensors, number, layout) for number in _LEVELS),
        )
    except (KeyError, ValueError, TypeError) as e:
        raise ProfileMismatch(f"{path} is not a whole profile: {e!r}") from e


def make_profile(
    arena_SX: Bytes,
    runs: Sequence[Sequence[int]],
    *,
    fingerprint: bytes,
    layout: KvLayout,
    key_factors: Sequence[float] = (),
) -> bytes:
    """The content of a profile's file, from samples: the slots of consecutive blocks, run by run.

    `key_factors` are, for each layer, how wide the bins of its keys are against the usual; none means 1 everywhere.
    """
    if len(key_factors) not in (0, layout.num_layers) or min(key_factors, default=1.0) <= 0:
        raise ValueError(f"key factors are {layout.num_layers} positive numbers, got {list(key_factors)}")
    known = KvStatistics.of([read_values(arena_SX, run, layout=layout) for run in runs], layout=layout)
    if key_factors:
        known.scale_L2[:, 0] *= np.array(key_factors, np.float32)
    tensors: dict[str, npt.NDArray[Any]] = {"mean": known.mean_GC, "alpha": known.alpha_GC}
    bits = []
    for level in _LEVELS:
        bins = known.bins(level=level)
        counts_PRS = _count(arena_SX, runs, bins, layout=layout)
        found = [fit_frequencies(counts) for counts in counts_PRS]
        tensors |= {
            f"bin.{level}": bins.delta_bin_GC,
            f"anchors.{level}": found[0],
            f"deltas.{level}": found[1],
        }
        bits.append(_bits_per_symbol(counts_PRS, found))
    metadata = {
        **_facts(fingerprint, layout),
        "bits_per_level": json.dumps([round(each, 3) for each in bits]),
    }
    content: bytes = numpy.save(tensors, metadata=metadata)
    return content


_LEVELS = range(1, NUM_CACHEGEN_LEVELS + 1)


def _facts(fingerprint: bytes, layout: KvLayout) -> dict[str, str]:
    return {"version": VERSION, "fingerprint": fingerprint.hex(), "layout": json.dumps(asdict(layout))}


def _digest(metadata: dict[str, str], tensors: dict[str, npt.NDArray[Any]]) -> bytes:
    """Not of the file: safetensors writes metadata in any order."""
    digest = blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=PROFILE_ID_BYTES)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype.str} {tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.digest()


def _level(tensors: dict[str, npt.NDArray[Any]], number: int, layout: KvLayout) -> LevelProfile:
    shape = (num_groups(layout), layout.head_dim)
    mean, alpha, width = tensors["mean"], tensors["alpha"], tensors[f"bin.{number}"]
    for each in (mean, alpha, width):
        if each.shape != shape or each.dtype != np.float32 or not np.isfinite(each).all():
            raise ValueError(f"a tensor of {each.dtype} {each.shape}, expected finite float32 {shape}")
    if width.min() <= 0:
        raise ValueError(f"bins must be positive, got {width.min()}")
    anchors, deltas = (
        SymbolTables.from_frequencies(tensors[f"{kind}.{number}"]) for kind in ("anchors", "deltas")
    )
    for tables in (anchors, deltas):
        if tables.num_rows != mean.size:
            raise ValueError(f"tables of {tables.num_rows} channels, expected {mean.size}")
    bins = Bins(mean_GC=mean, alpha_GC=alpha, anchor_bin_GC=width, delta_bin_GC=width)
    return LevelProfile(bins=bins, anchor_tables=anchors, delta_tables=deltas)


def _count(
    arena_SX: Bytes, runs: Sequence[Sequence[int]], bins: Bins, *, layout: KvLayout
) -> list[npt.NDArray[np.int64]]:
    """How often each symbol is in each channel [R, S], of the anchors and of the deltas."""
    totals = [np.zeros((bins.mean_GC.size, NUM_SYMBOLS), np.int64) for _ in range(2)]
    for run in runs:
        for total, symbols in zip(totals, quantize(arena_SX, run, bins, layout=layout), strict=True):
            total += count_symbols(symbols, num_symbols=NUM_SYMBOLS)
    return totals


def _bits_per_symbol(counts: Sequence[npt.NDArray[np.int64]], frequencies: Sequence[Frequencies]) -> float:
    bits = sum(
        -(count * np.log2(found / TOTAL_FREQUENCY)).sum()
        for count, found in zip(counts, frequencies, strict=True)
    )
    return float(bits / sum(count.sum() for count in counts))
