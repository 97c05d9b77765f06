"""How a prefix that lies elsewhere gets here soonest: what to load, at which level, and what to compute. Pure.

A region of a prompt is cut into chunks. The engine computes them from the first on; loading brings them from the last
back, so that both always have work and meet at a *split*:

    computed here            loaded
    |--->                        <---|
    0    first     split       end   n        chunks

`plan_stream` is asked again before every chunk, with the throughput of the chunks before it. For every level it finds
the split at which the later of the two ends soonest, and takes the least lossy level that ends within the objective;
where none does, the fastest. All computed is a split at `end`, all loaded one at `first`: so a link that breaks down
hands what is left to the engine, and one that recovers takes it back. A disk is a source with one level.

Loading is a pipeline: while a chunk is decoded, the next one travels. With the same ratio of the two for every chunk,
it takes the slower of them for all tokens, and the faster one for one chunk more.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from kvstore.blocks import BLOCK_SIZE_TOKENS

Choice = Literal["load", "recompute", "mixed"]

# A prompt is computed in part only where that saves so much of loading all of it.
_LEAST_GAIN = 0.15


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelCost:
    """What a token costs on its way at one level: measured, or an estimate where nothing has been measured."""

    level: int  # its number in the codec; 0 is raw
    bytes_per_token: float
    prepare_s_per_token: float = 0.0  # at the source, as far as the link waits for it
    decode_s_per_token: float = 0.0

    def __post_init__(self) -> None:
        if self.bytes_per_token <= 0 or self.prepare_s_per_token < 0 or self.decode_s_per_token < 0:
            raise ValueError(f"a token takes bytes and no negative time, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamView:
    """Where a load stands, and what is known about the ways to go on. Chunks count from 0 in token order."""

    chunk_blocks: Sequence[int]  # the sizes of all chunks of the region
    compute_s: Sequence[float]  # what each of them takes to compute here
    first_chunk: int  # those before it are computed
    end_chunk: int  # those from it on are here or were asked for; the next to ask for is the one before it
    levels: Sequence[LevelCost]  # what the source can send, least lossy first
    throughput_bytes_s: float
    latency_s: float = 0.0  # from asking for a chunk until its first byte, beside its preparation
    pending_s: float = 0.0  # until all that was asked for is here
    queue_s: float = 0.0  # until the engine goes on with this prompt
    tail_s: float = 0.0  # computing what comes after the region
    time_left_s: float  # to the objective; negative when it is missed

    def __post_init__(self) -> None:
        if len(self.compute_s) != len(self.chunk_blocks):
            raise ValueError(f"{len(self.chunk_blocks)} chunks, but computing times of {len(self.compute_s)}")
        if not 0 <= self.first_chunk <= self.end_chunk <= len(self.chunk_blocks):
            raise ValueError(
                f"first_chunk ({self.first_chunk}) and end_chunk ({self.end_chunk}) must be in this order "
                f"within {len(self.chunk_blocks)} chunks"
            )
        if self.throughput_bytes_s <= 0:
            raise ValueError(f"throughput_bytes_s must be positive, got {self.throughput_bytes_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamLimits:
    max_level: int  # nothing more lossy


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamPlan:
    """What to do now; the predictions are seconds from now until all of the prompt has its KV."""

    split: int  # the first chunk that is to be loaded; end_chunk: ask for no more
    level: int  # for the next chunk, end_chunk - 1
    choice: Choice
    predicted_s: float
    predicted_recompute_s: float  # of computing all that was not asked for
    predicted_load_s: float  # of computing none of it, at the fastest level


def plan_stream(view: StreamView, limits: StreamLimits) -> StreamPlan:
    """Raises ValueError if no level of the view is allowed."""
    allowed = [cost for cost in view.levels if cost.level <= limits.max_level]
    if not allowed:
        raise ValueError(f"the source has no level up to {limits.max_level}")
    race = _Race(view)
    best = [_Way(cost, *race.best_split(cost)) for cost in allowed]
    ways = [race.all_loaded(way) or way for way in best]
    in_time = (way for way in ways if way.finish_s <= view.time_left_s)
    chosen = next(in_time, None) or min(ways, key=lambda way: way.finish_s)
    return StreamPlan(
        split=chosen.split,
        level=chosen.cost.level,
        choice=_choice(view, chosen.split),
        predicted_s=chosen.finish_s,
        predicted_recompute_s=race.finish_s(view.end_chunk, allowed[0]),
        predicted_load_s=min(race.finish_s(view.first_chunk, cost) for cost in allowed),
    )


def regret_s(actual_s: float, hindsight: StreamPlan) -> float:
    """How much sooner loading all, computing all or the planned mixture would have been.

    `hindsight` is the plan of the load's beginning, made again with what was measured on the way.
    """
    best_s = min(hindsight.predicted_s, hindsight.predicted_load_s, hindsight.predicted_recompute_s)
    return max(0.0, actual_s - best_s)


def _choice(view: StreamView, split: int) -> Choice:
    if split == view.end_chunk:
        return "recompute"
    return "load" if split == view.first_chunk else "mixed"


@dataclass(frozen=True, slots=True)
class _Way:
    cost: LevelCost
    split: int
    finish_s: float


class _Race:
    """Loading against computing, for any split."""

    def __init__(self, view: StreamView) -> None:
        self._view = view
        self._blocks_before = list(accumulate(view.chunk_blocks, initial=0))
        self._compute_s_before = list(accumulate(view.compute_s, initial=0.0))
        self._chunk_tokens = max(view.chunk_blocks, default=0) * BLOCK_SIZE_TOKENS

    def best_split(self, cost: LevelCost) -> tuple[int, float]:
        """The split with the soonest end, and that end. The later a split, the more is computed and the less loaded."""
        view = self._view
        splits = range(view.first_chunk, view.end_chunk + 1)
        crossing = bisect_left(
            splits, True, key=lambda split: self._computed_s(split) >= self._loaded_s(split, cost)
        )
        near = [splits[index] for index in (crossing - 1, crossing) if 0 <= index < len(splits)]
        split = min(near, key=lambda split: self.finish_s(split, cost))
        return split, self.finish_s(split, cost)

    def all_loaded(self, way: _Way) -> _Way | None:
        """Instead of `way`, if that is about as good and not too late for it.

        Estimates are no better than that, and the engine, whose cores may be those that decode, has other work.
        """
        view = self._view
        loaded_s = self.finish_s(view.first_chunk, way.cost)
        most_s = min(way.finish_s * (1.0 + _LEAST_GAIN), self.finish_s(view.end_chunk, way.cost))
        if way.finish_s <= view.time_left_s:
            most_s = min(most_s, view.time_left_s)
        return _Way(way.cost, view.first_chunk, loaded_s) if loaded_s <= most_s else None

    def finish_s(self, split: int, cost: LevelCost) -> float:
        return max(self._computed_s(split), self._loaded_s(split, cost)) + self._view.tail_s

    def _computed_s(self, split: int) -> float:
        view = self._view
        return view.queue_s + self._compute_s_before[split] - self._compute_s_before[view.first_chunk]

    def _loaded_s(self, split: int, cost: LevelCost) -> float:
        view = self._view
        num_tokens = (self._blocks_before[view.end_chunk] - self._blocks_before[split]) * BLOCK_SIZE_TOKENS
        if num_tokens == 0:
            return view.pending_s
        travel_s = cost.bytes_per_token / view.throughput_bytes_s + cost.prepare_s_per_token
        slower_s, faster_s = sorted((travel_s, cost.decode_s_per_token), reverse=True)
        start_s = max(view.pending_s, view.latency_s)
        return start_s + num_tokens * slower_s + min(num_tokens, self._chunk_tokens) * faster_s
