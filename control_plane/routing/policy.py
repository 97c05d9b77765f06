"""The numbers a routing decision depends on."""

from collections.abc import Mapping
from dataclasses import dataclass

from control_plane.routing.scorers import SCORERS


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingPolicy:
    """`prefill_threshold_tokens`: fewer uncached tokens are computed by the decode worker itself.

    `max_waiting`: a worker that reports so many waiting requests gets no more. `weights`: by scorer's name.
    """

    prefill_threshold_tokens: int
    weights: Mapping[str, float]
    max_waiting: int = 1024

    def __post_init__(self) -> None:
        if self.prefill_threshold_tokens < 0:
            raise ValueError(
                f"prefill_threshold_tokens must not be negative, got {self.prefill_threshold_tokens}"
            )
        if self.max_waiting < 1:
            raise ValueError(f"max_waiting must be at least 1, got {self.max_waiting}")
        unknown = sorted(self.weights.keys() - SCORERS.keys())
        if unknown:
            raise ValueError(f"there is no scorer {unknown[0]!r}; there are {', '.join(SCORERS)}")
        if any(weight < 0 for weight in self.weights.values()) or not sum(self.weights.values()) > 0:
            raise ValueError(f"weights must not be negative nor all 0, got {dict(self.weights)}")
