"""What a load learns on its way: how fast a source sends, and what a level costs. For `kvstore.streaming`.

No clock: the times are arguments. One `LinkEstimate` for each source outlives single loads, one `LevelEstimates` serves
all of them.
"""

from collections.abc import Mapping, Sequence

from kvstore.streaming import LevelCost

# Of a source that was never measured. Wrong in either direction for the first chunk alone.
PRIOR_THROUGHPUT_BYTES_S = 125e6  # 1 Gbit/s
PRIOR_LATENCY_S = 0.001
# The newest measurement counts so much, in the exponent: after a jump by ten, the estimate is off by 1.8 after one
# chunk and by 1.15 after two. Links jump, and a chunk is long enough to be a sound measurement.
_NEWEST_SHARE = 0.75
# What was measured is believed by half after so long: without that, a link that was slow once is never tried again.
_HALF_LIFE_S = 20.0
_LEAST_SAMPLE_BYTES = 16 * 1024  # less says more about the scheduler than about the link
_LEAST_SAMPLE_S = 1e-6


class LinkEstimate:
    """How fast bytes come from one source, and how long the first one takes."""

    def __init__(self, *, prior_bytes_s: float = PRIOR_THROUGHPUT_BYTES_S) -> None:
        self._prior_bytes_s = prior_bytes_s
        self._throughput_bytes_s = prior_bytes_s
        self._latency_s: float | None = None
        self._measured_at_s: float | None = None

    def throughput_bytes_s(self, *, now_s: float) -> float:
        """What was measured, drifting towards the prior while nothing is."""
        if self._measured_at_s is None:
            return self._prior_bytes_s
        belief = 0.5 ** (max(0.0, now_s - self._measured_at_s) / _HALF_LIFE_S)
        return _between(self._prior_bytes_s, self._throughput_bytes_s, share=belief)

    @property
    def latency_s(self) -> float:
        return PRIOR_LATENCY_S if self._latency_s is None else self._latency_s

    def received(self, num_bytes: int, *, receive_s: float, now_s: float, waited_s: float = 0.0) -> None:
        """A chunk came whole, within `receive_s` of its first byte; for that nothing came in `waited_s`.

        What was waited for may have been the source or the link, and what then came at once may have lain in buffers.
        So it says how fast the link is at least and at most, and nothing against an estimate in between.
        """
        if num_bytes < _LEAST_SAMPLE_BYTES:
            return
        least = num_bytes / max(receive_s + waited_s, _LEAST_SAMPLE_S)
        most = num_bytes / max(receive_s, _LEAST_SAMPLE_S)
        sample = min(max(self.throughput_bytes_s(now_s=now_s), least), most)
        if self._measured_at_s is None:
            self._throughput_bytes_s = sample
        else:
            self._throughput_bytes_s = _between(self._throughput_bytes_s, sample, share=_NEWEST_SHARE)
        self._measured_at_s = now_s

    def overdue(self, num_bytes: int, *, waited_s: float, now_s: float) -> None:
        """`num_bytes` were to come, and are not here after `waited_s`: the link is not faster than that."""
        most = num_bytes / max(waited_s, _LEAST_SAMPLE_S)
        if most < self.throughput_bytes_s(now_s=now_s):
            self._throughput_bytes_s, self._measured_at_s = most, now_s

    def answered(self, latency_s: float) -> None:
        """So long from asking to the first byte, with nothing else under way."""
        known_s = latency_s if self._latency_s is None else self._latency_s
        self._latency_s = known_s + 0.5 * (max(0.0, latency_s) - known_s)


class LevelEstimates:
    """What a token costs at each level, from the codec's own estimates on."""

    def __init__(self, priors: Sequence[LevelCost]) -> None:
        self._costs = {cost.level: cost for cost in priors}
        self._measured: set[int] = set()

    def costs(self) -> tuple[LevelCost, ...]:
        return tuple(self._costs.values())

    def observe(self, level: int, *, num_tokens: int, coded_bytes: int, seconds: Mapping[str, float]) -> None:
        """One chunk. `seconds` may have "decode". What the source takes is a matter of each pull."""
        known = self._costs[level]
        share = 0.5 if level in self._measured else 1.0
        self._measured.add(level)

        def moved(old: float, total: float | None) -> float:
            return old if total is None else old + share * (max(0.0, total) / num_tokens - old)

        self._costs[level] = LevelCost(
            level=level,
            bytes_per_token=moved(known.bytes_per_token, coded_bytes),
            decode_s_per_token=moved(known.decode_s_per_token, seconds.get("decode")),
        )


def _between(low: float, high: float, *, share: float) -> float:
    """From `low` towards `high` by `share` of the way, in the exponent: twice and half as fast are equally far."""
    return float(low ** (1.0 - share) * high**share)
