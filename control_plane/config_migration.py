"""Settings of what moves requests by itself."""

from dataclasses import dataclass

from control_plane.config_workers import bounded


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrationConfig:
    """Freeness: pages that each running request of a worker can still grow by."""

    enabled: bool = True  # False: requests move only when somebody asks for it
    interval_s: float = 1.0  # between two looks at the workers
    timeout_s: float = 10.0  # for one move; then the request stays where it is
    low_freeness: float = 4.0  # requests leave workers that have less
    high_freeness: float = 16.0  # for those that have more
    rest_s: float = 10.0  # between two moves of one request, unless its worker drains

    def __post_init__(self) -> None:
        bounded("interval_s", self.interval_s, low=0.05, high=3600)
        bounded("timeout_s", self.timeout_s, low=0.1, high=3600)
        bounded("low_freeness", self.low_freeness, low=0, high=1_000_000)
        bounded("high_freeness", self.high_freeness, low=0, high=1_000_000)
        bounded("rest_s", self.rest_s, low=0, high=86_400)
        if self.high_freeness <= self.low_freeness:
            raise ValueError(
                f"high_freeness is {self.high_freeness:g}, but requests must not move to and fro: "
                f"more than low_freeness, {self.low_freeness:g}"
            )
