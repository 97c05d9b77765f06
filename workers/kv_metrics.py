"""What a worker counts of its KV store, for Prometheus and for whoever asks what the tiers do.

Fed from the event loop; read by the HTTP server's thread.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvstore.streaming import Choice
from kvstore.tiers.tier import Tier, TierStats

# What two ends, or a worker and its files, can disagree on.
Mismatch = Literal["block_format", "fingerprint", "layout", "profile", "salt"]

_LOAD_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelTraffic:
    """What travelled at one level, before and after coding."""

    raw_bytes: int = 0
    coded_bytes: int = 0


class KvMetrics:
    """All with the label `model_name`. Totals since the start can be read back; Prometheus's own cannot."""

    def __init__(self, registry: CollectorRegistry, *, model_name: str) -> None:
        self.num_lookup_blocks = 0
        self.num_hit_blocks: dict[Tier, int] = dict.fromkeys(Tier, 0)
        self.levels: dict[str, LevelTraffic] = {}
        self._registry = registry
        self._model_name = model_name
        self._tiers = _TierCollector(model_name)
        registry.register(self._tiers)
        self._lookups = self._counter("penstock_kv_lookup_blocks", "Full blocks of prompts looked for")
        self._hits = self._counter("penstock_kv_hit_blocks", "Blocks found, by tier", "tier")
        self._loaded = self._counter("penstock_kv_loaded_blocks", "Blocks brought to the engine", "tier")
        self._load_s = Histogram(
            "penstock_kv_load_seconds",
            "Of loads, by tier",
            ("model_name", "tier"),
            buckets=_LOAD_BUCKETS_S,
            registry=registry,
        )
        self._raw_bytes = self._counter("penstock_kv_chunk_raw_bytes", "KV received, decoded", "level")
        self._coded_bytes = self._counter("penstock_kv_chunk_coded_bytes", "KV received, as coded", "level")
        self._coded = self._counter(
            "penstock_kv_coded_cache_chunks",
            "Chunks that peers wanted, by whether they were coded before: hit, miss",
            "outcome",
        )
        self._coded_cache_bytes = Gauge(
            "penstock_kv_coded_cache_bytes",
            "Bytes of chunks that are kept coded",
            ("model_name",),
            registry=registry,
        ).labels(model_name)
        self._decisions = self._counter(
            "penstock_kv_decisions",
            "Prefixes found elsewhere, by what was done: load, recompute, mixed",
            "choice",
        )
        self._regret_s = Histogram(
            "penstock_kv_regret_seconds",
            "How much sooner another choice would have been, by what was measured on the way",
            ("model_name",),
            buckets=_LOAD_BUCKETS_S,
            registry=registry,
        ).labels(model_name)
        self._mismatches = self._counter(
            "penstock_kv_mismatches", "Blocks of others that could not be used, by what differed", "what"
        )
        self._failures = self._counter("penstock_kv_load_failures", "Loads cut short, by reason", "reason")
        self._write_behind = self._counter(
            "penstock_kv_write_behind_blocks",
            "Blocks on their way out of device pages, by outcome",
            "outcome",
        )

    def lookup(self, num_blocks: int, hits: Mapping[Tier, int]) -> None:
        """A request asked for `num_blocks`; `hits` says how many of them lie where, in the fastest tier each."""
        self.num_lookup_blocks += num_blocks
        self._lookups.labels(self._model_name).inc(num_blocks)
        for tier, num_hits in hits.items():
            self.num_hit_blocks[tier] += num_hits
            self._hits.labels(self._model_name, tier.name.lower()).inc(num_hits)

    def loaded(self, tier: Tier, num_blocks: int, seconds: float) -> None:
        self._loaded.labels(self._model_name, tier.name.lower()).inc(num_blocks)
        self._load_s.labels(self._model_name, tier.name.lower()).observe(seconds)

    def chunk(self, level_name: str, raw_bytes: int, coded_bytes: int) -> None:
        known = self.levels.get(level_name, LevelTraffic())
        self.levels[level_name] = LevelTraffic(
            raw_bytes=known.raw_bytes + raw_bytes, coded_bytes=known.coded_bytes + coded_bytes
        )
        self._raw_bytes.labels(self._model_name, level_name).inc(raw_bytes)
        self._coded_bytes.labels(self._model_name, level_name).inc(coded_bytes)

    def coded_cache(self, outcome: Literal["hit", "miss"], *, num_bytes: int) -> None:
        """A peer wants a coded chunk; `num_bytes` are kept."""
        self._coded.labels(self._model_name, outcome).inc()
        self._coded_cache_bytes.set(num_bytes)

    def decided(self, choice: Choice) -> None:
        self._decisions.labels(self._model_name, choice).inc()

    def regret(self, seconds: float) -> None:
        self._regret_s.observe(seconds)

    def mismatch(self, what: Mismatch) -> None:
        self._mismatches.labels(self._model_name, what).inc()

    def load_failed(self, reason: str) -> None:
        self._failures.labels(self._model_name, reason).inc()

    def write_behind(self, num_blocks: int, outcome: str) -> None:
        self._write_behind.labels(self._model_name, outcome).inc(num_blocks)

    def set_tiers(self, tiers: Mapping[Tier, TierStats]) -> None:
        """How the tiers stand now. To be called now and then from where they live: a scrape shows the last ones."""
        self._tiers.stats = dict(tiers)

    def _counter(self, name: str, explanation: str, *labels: str) -> Counter:
        return Counter(name, explanation, ("model_name", *labels), registry=self._registry)


class _TierCollector(Collector):
    """The figures of the tiers, which count for themselves, under the names of ours."""

    def __init__(self, model_name: str) -> None:
        self.stats: Mapping[Tier, TierStats] = {}
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self.stats  # once: another thread may set them
        for name, field, explanation in _TIER_GAUGES:
            gauge = GaugeMetricFamily(name, explanation, labels=("model_name", "tier"))
            for tier, of_tier in stats.items():
                gauge.add_metric((self._model_name, tier.name.lower()), getattr(of_tier, field))
            yield gauge
        for name, field, explanation in _TIER_COUNTERS:
            counter = CounterMetricFamily(name, explanation, labels=("model_name", "tier"))
            for tier, of_tier in stats.items():
                counter.add_metric((self._model_name, tier.name.lower()), getattr(of_tier, field))
            yield counter


_TIER_GAUGES: Final = (
    ("penstock_kv_tier_blocks", "num_blocks", "Blocks held"),
    ("penstock_kv_tier_used_bytes", "used_bytes", "Bytes they take"),
    ("penstock_kv_tier_capacity_bytes", "capacity_bytes", "Bytes they may take"),
)
_TIER_COUNTERS: Final = (
    ("penstock_kv_tier_stored_blocks", "num_stored_blocks", "Blocks taken in"),
    ("penstock_kv_tier_evicted_blocks", "num_evicted_blocks", "Blocks that made room for others"),
    ("penstock_kv_tier_errors", "num_errors", "Reads and writes that failed, and corrupted blocks"),
)
