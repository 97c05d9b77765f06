"""What bins follow from: the mean, the spread and the likeness of neighbours of each channel.

The bins were chosen on the demo model: held-out text after 512 tokens of coded context, sizes against text that the
tables had not seen.

    codec                                                  bits a value   perplexity
    paper: alpha 1, bins by channel                            2.65         +1.32 %
    alpha fitted, bins by channel                              2.29         +1.15 %
    alpha fitted, one bin for all channels                     2.16         +1.05 %
    bins growing with depth (0.6, 0.8, 1, 1), keys = values    2.11         +1.27 %
    one bin for keys, twice as wide for values                 1.72         +0.92 %

Layers differ more: half of the error, and nearly all that recall of 2048 tokens loses, is from the keys of the demo
model's second layer. Bins of a quarter there cost 0.2 bits a value and win back 10 points of 14, so a profile takes
factors for each layer (`profile.py`).

A channel of the demo model's values is hardly like its neighbour's (alpha 0.05; keys 0.3), so the paper's plain deltas
add the anchor's variance. Bins growing with depth, the paper's rule, lost to equal ones. Transforms decorrelate further
(a principal-component rotation per head on keys without their rotary turn, weighted by how much errors matter: 1.6 bits
at +1 %); that was not worth a matrix product for every value.

G groups (layer, keys or values, head), T tokens, C channels of a head.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from kvstore.codec.levels import CACHEGEN_BINS
from kvstore.codec.quantize import MAX_STEPS, TOKENS_PER_ANCHOR, Bins, Bytes, Floats
from kvstore.layout import KvLayout

VALUES_PER_KEYS_BIN = 2.0
_FARTHER_THAN_SEEN = 1.2  # outliers beyond the largest one of the sample
_LEAST_BIN = np.float32(1e-20)

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class KvStatistics:
    """Per channel, but `scale_L2`, the root mean square around the means, of each layer's keys and values."""

    mean_GC: Floats
    alpha_GC: Floats
    reach_GC: Floats  # the largest distance from the mean
    scale_L2: Floats

    @classmethod
    def of(cls, sequences: Sequence[Floats], *, layout: KvLayout) -> Self:
        """Of samples [G, T, C], each a run of consecutive tokens."""
        mean = _sum(values.sum(axis=1, dtype=np.float64) for values in sequences)
        mean /= sum(values.shape[1] for values in sequences)
        mean_GC = mean.astype(np.float32)
        moved = [values - mean_GC[:, None] for values in sequences]
        squares = _sum(np.square(values).sum(axis=1, dtype=np.float64) for values in moved)
        variance_GC = squares / sum(values.shape[1] for values in moved)
        by_layer = variance_GC.reshape(layout.num_layers, 2, -1).mean(axis=2)
        return cls(
            mean_GC=mean_GC,
            alpha_GC=_likeness(moved),
            reach_GC=np.max([np.abs(values).max(axis=1) for values in moved], axis=0),
            scale_L2=np.sqrt(by_layer).astype(np.float32),
        )

    def bins(self, *, level: int) -> Bins:
        """The bins of a CacheGen level: as wide as it asks, or as the channel's outliers need."""
        bin_GC = np.maximum(_asked(self.scale_L2, level, len(self.mean_GC)), self._needed_GC())
        return Bins(mean_GC=self.mean_GC, alpha_GC=self.alpha_GC, anchor_bin_GC=bin_GC, delta_bin_GC=bin_GC)

    def widening_GC(self, *, level: int) -> Bytes:
        """How many times wider than the level asks the bins of a channel must be for its outliers."""
        times_GC = np.ceil(self._needed_GC() / _asked(self.scale_L2, level, len(self.mean_GC)))
        widening_GC: Bytes = np.clip(times_GC, 1, 255).astype(np.uint8)
        return widening_GC

    def _needed_GC(self) -> Floats:
        needed_GC: Floats = self.reach_GC * (1 + self.alpha_GC) * np.float32(_FARTHER_THAN_SEEN / MAX_STEPS)
        return needed_GC


def make_bins(known: "KvStatistics", widening_GC: Bytes, *, level: int) -> Bins:
    """The bins of a CacheGen level where only whole multiples of what it asks are known; `reach_GC` is not read."""
    bin_GC = widening_GC * _asked(known.scale_L2, level, len(widening_GC))
    return Bins(mean_GC=known.mean_GC, alpha_GC=known.alpha_GC, anchor_bin_GC=bin_GC, delta_bin_GC=bin_GC)


def _asked(scale_L2: Floats, level: int, num_groups: int) -> Floats:
    """The bin that a level asks for, of each group [G, 1]."""
    parts = np.float32(CACHEGEN_BINS[level - 1]) * np.array([1, VALUES_PER_KEYS_BIN], np.float32)
    # Channels that never move still have bins, so that dividing by them gives numbers.
    bins_L2 = np.maximum(scale_L2 * parts, _LEAST_BIN)
    asked_G1: Floats = np.repeat(bins_L2.ravel(), num_groups // bins_L2.size)[:, None]
    return asked_G1


def _likeness(moved: Sequence[Floats]) -> Floats:
    """How much of an anchor its group repeats: the least-squares factor, from 0 to 1."""
    products, squares = 0.0, 0.0
    for values in moved:
        groups, tokens, width = values.shape
        whole = tokens // TOKENS_PER_ANCHOR * TOKENS_PER_ANCHOR
        values_GNAC = values[:, :whole].reshape(groups, -1, TOKENS_PER_ANCHOR, width)
        anchors, others = values_GNAC[:, :, :1], values_GNAC[:, :, 1:]
        products = products + (anchors * others).sum(axis=(1, 2), dtype=np.float64)
        squares = squares + np.square(anchors).sum(axis=(1, 2), dtype=np.float64) * (TOKENS_PER_ANCHOR - 1)
    alpha_GC: Floats = np.clip(products / np.maximum(squares, 1e-30), 0, 1).astype(np.float32)
    return alpha_GC


def _sum(parts: Iterable[Doubles]) -> Doubles:
    total: Doubles = np.add.reduce(list(parts))
    return total
