"""The levels of the codec: what a number on the wire means, and how small it makes a value.

0 is the KV as it is. 1 to NUM_CACHEGEN_LEVELS are CacheGen's, from near-lossless to smallest. What follows is known
from the literature and there to be compared with; the controller never picks it.
"""

from dataclasses import dataclass

from kvstore.layout import ITEM_BYTES, KvLayout

RAW = 0
NUM_CACHEGEN_LEVELS = 4
INT8 = NUM_CACHEGEN_LEVELS + 1
KIVI4 = NUM_CACHEGEN_LEVELS + 2
KIVI2 = NUM_CACHEGEN_LEVELS + 3

# Of the demo model; a profile says what its own model's are.
_USUAL_BITS = (4.5, 3.5, 2.7, 2.2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """`bytes_per_value` is an estimate of the coded size; `is_comparison` marks what the controller must not pick."""

    number: int
    name: str
    bytes_per_value: float
    is_comparison: bool = False


def list_levels(layout: KvLayout, *, cachegen_bits: tuple[float, ...] | None = None) -> tuple[Level, ...]:
    """All levels, each at the index that is its number; `cachegen_bits` per value where a profile knows them."""
    bits = cachegen_bits or _USUAL_BITS
    found = [Level(number=RAW, name="raw", bytes_per_value=ITEM_BYTES[layout.dtype])]
    found += [
        Level(number=number, name=f"cachegen-{number}", bytes_per_value=one / 8)
        for number, one in enumerate(bits, start=1)
    ]
    for number, name, num_bits in ((INT8, "int8", 8.0), (KIVI4, "kivi-4", 4.0), (KIVI2, "kivi-2", 2.0)):
        # The scales come on top: two bytes a token and head of 8-bit values; KIVI's, four bytes per 32 values.
        overhead = 16 / layout.head_dim if number == INT8 else 1.0
        found.append(
            Level(number=number, name=name, bytes_per_value=(num_bits + overhead) / 8, is_comparison=True)
        )
    return tuple(found)
