"""The levels of the codec: what a number on the wire means, and how small it makes a value.

0 is the KV as it is. 1 to NUM_CACHEGEN_LEVELS are CacheGen's, from near-lossless to smallest. What follows is known
from the literature and there to be compared with; the controller never picks it.
"""

from dataclasses import dataclass

from kvstore.layout import KvLayout

RAW = 0
# Bins of the keys as parts of their root mean square; VALUES_PER_KEYS_BIN (`channels.py`) says what the values' are.
CACHEGEN_BINS = (0.2, 0.4, 0.7)
NUM_CACHEGEN_LEVELS = len(CACHEGEN_BINS)
INT8 = NUM_CACHEGEN_LEVELS + 1
KIVI4 = NUM_CACHEGEN_LEVELS + 2
KIVI2 = NUM_CACHEGEN_LEVELS + 3

_USUAL_BITS = (3.6, 2.8, 2.15)  # a value, of the demo model; a profile says what its own model's are


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """`bytes_per_value` is an estimate of the coded size; `is_comparison` marks what the controller must not pick."""

    number: int
    name: str
    bytes_per_value: float
    is_comparison: bool = False


def list_levels(layout: KvLayout, *, cachegen_bits: tuple[float, ...] | None = None) -> tuple[Level, ...]:
    """All levels, each at the index that is its number; `cachegen_bits` per value where a profile knows them.

    KV that is quantised already stays as it is: its numbers are 8 bits, and to round them again would add its error.
    """
    found = [Level(number=RAW, name="raw", bytes_per_value=layout.bytes_per_value)]
    if layout.is_scaled:
        return tuple(found)
    found += [
        Level(number=number, name=f"cachegen-{number}", bytes_per_value=bits / 8)
        for number, bits in enumerate(cachegen_bits or _USUAL_BITS, start=1)
    ]
    # With their scales: of KIVI's groups, two halves for 32 tokens of a key's channel or for a value's token and head.
    kivi_scales = (1 + 32 / layout.head_dim) / 2
    compared = (
        (INT8, "int8", 8 + 16 / layout.head_dim),
        (KIVI4, "kivi-4", 4 + kivi_scales),
        (KIVI2, "kivi-2", 2 + kivi_scales),
    )
    found += [
        Level(number=number, name=name, bytes_per_value=bits / 8, is_comparison=True)
        for number, name, bits in compared
    ]
    return tuple(found)
