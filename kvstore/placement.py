"""Which blocks a bounded tier keeps, and which move between memory and disk. Pure decisions.

A block's retention value is what it costs to compute it anew, per second since it was last used (Pensieve). A policy
is that cost as a function of where the block begins; LRU is the policy under which all blocks cost the same. The
block of least value goes first, but never before the blocks that continue it: what remains is always a prefix.
"""

import math
from collections.abc import Callable, Sequence

# A token's linear layers cost as much as its attention over a context this long: 2 x 7.5e9 FLOPs against
# 4 x 4096 x 32 per token of context in Llama-3-8B. Small models get there sooner; the order of blocks hardly changes.
ATTENTION_EQUALS_LINEAR_TOKENS = 28_600

# Costs are rounded to quarters of an octave: blocks of one class are compared by age alone, so that the least valuable
# block is the head of one of a few queues. Without the rounding it could be anywhere.
CLASSES_PER_OCTAVE = 4

# A block used this lately belongs to a prompt that is still being stored or loaded: least of all it goes then.
BUSY_S = 5.0
# Added to all other ages, as between blocks used a moment ago, age tells little. Beside LRU, a memory of 10^6 tokens
# saves 1.11 and 1.27 x the FLOPs on the Mooncake traces (bench/kv_reuse.py). To count the first minute as one moment
# saved 1.46 and 1.35 x there, but 0.88 x where agents come back within seconds; this, 0.99 to 1.01 x.
GRACE_S = 10.0
_LEAST_IDLE_S = 1e-3

# The cost of a block by its first token.
Policy = Callable[[int], float]


def lru(first_token: int) -> float:
    return 1.0


def cost(first_token: int) -> float:
    """Of recomputing a block, in units of the cost of its linear layers: attention reads all tokens before it."""
    return 1.0 + first_token / ATTENTION_EQUALS_LINEAR_TOKENS


POLICIES: dict[str, Policy] = {"lru": lru, "cost": cost}


def cost_class(block_cost: float) -> int:
    return round(CLASSES_PER_OCTAVE * math.log2(block_cost))


def retention_value(of_class: int, *, idle_s: float) -> float:
    """The block with the lowest one is dropped first."""
    counted_s = idle_s + GRACE_S if idle_s >= BUSY_S else max(idle_s, _LEAST_IDLE_S)
    return math.exp2(of_class / CLASSES_PER_OCTAVE) / counted_s


def stretches(wanted: Sequence[bool]) -> list[tuple[int, int]]:
    """The (start, stop) of every run of wanted blocks: each is one read or one write."""
    if all(wanted):
        return [(0, len(wanted))] if wanted else []
    found: list[tuple[int, int]] = []
    for position, is_wanted in enumerate(wanted):
        if not is_wanted:
            continue
        if found and found[-1][1] == position:
            found[-1] = (found[-1][0], position + 1)
        else:
            found.append((position, position + 1))
    return found
