"""Which cores a worker computes on. Pure: the cores at hand are an argument."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence


def assign_cores(num_workers: int, cores: Iterable[int]) -> list[tuple[int, ...]]:
    """A set of cores for each worker: disjoint, together all cores, of sizes that differ by one at most.

    More workers than cores: each gets one core, and no core carries two workers more than another.
    """
    ordered = sorted(set(cores))
    if not ordered:
        raise ValueError("cores is empty, but a worker needs at least one")
    if num_workers > len(ordered):
        return [(ordered[index % len(ordered)],) for index in range(num_workers)]
    bounds = [index * len(ordered) // num_workers for index in range(num_workers + 1)] if num_workers else []
    return [tuple(ordered[low:high]) for low, high in itertools.pairwise(bounds)]


def least_used_cores(taken: Sequence[tuple[int, ...]], cores: Iterable[int]) -> tuple[int, ...]:
    """Cores for one worker more beside those that keep theirs: an even share, of the least used."""
    ordered = sorted(set(cores))
    if not ordered:
        raise ValueError("cores is empty, but a worker needs at least one")
    carried = Counter(core for cores_of_one in taken for core in cores_of_one)
    size = max(1, len(ordered) // (len(taken) + 1))
    return tuple(sorted(sorted(ordered, key=lambda core: (carried[core], core))[:size]))
