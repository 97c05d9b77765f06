from dataclasses import replace

from prometheus_client import CollectorRegistry

from kvstore.tiers.tier import Tier, TierStats
from workers.kv_metrics import KvMetrics, LevelTraffic

STATS = TierStats(
    num_blocks=3,
    capacity_blocks=10,
    used_bytes=300,
    capacity_bytes=1000,
    num_hit_blocks=5,
    num_stored_blocks=7,
    num_evicted_blocks=4,
    num_errors=1,
)


def make() -> tuple[KvMetrics, CollectorRegistry]:
    registry = CollectorRegistry()
    return KvMetrics(registry, model_name="m"), registry


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, {"model_name": "m", **labels})


def test_lookups_are_counted_in_blocks_and_hits_by_tier() -> None:
    metrics, registry = make()
    metrics.lookup(10, {Tier.DEVICE: 2, Tier.DISK: 3})
    metrics.lookup(5, {})
    assert value(registry, "penstock_kv_lookup_blocks_total") == 15
    assert value(registry, "penstock_kv_hit_blocks_total", tier="disk") == 3
    assert (metrics.num_lookup_blocks, metrics.num_hit_blocks[Tier.DEVICE]) == (15, 2)


def test_what_travels_is_counted_by_level() -> None:
    metrics, registry = make()
    metrics.chunk("fine", 1000, 200)
    metrics.chunk("fine", 1000, 300)
    assert metrics.levels == {"fine": LevelTraffic(raw_bytes=2000, coded_bytes=500)}
    assert value(registry, "penstock_kv_chunk_coded_bytes_total", level="fine") == 500


def test_loads_decisions_and_what_went_wrong_have_counters() -> None:
    metrics, registry = make()
    metrics.loaded(Tier.PEER, 4, 0.2)
    metrics.decided("mixed")
    metrics.regret(0.5)
    metrics.mismatch("layout")
    metrics.load_failed("timeout")
    metrics.write_behind(6, "dropped")
    assert value(registry, "penstock_kv_loaded_blocks_total", tier="peer") == 4
    assert value(registry, "penstock_kv_load_seconds_sum", tier="peer") == 0.2
    assert value(registry, "penstock_kv_decisions_total", choice="mixed") == 1
    assert value(registry, "penstock_kv_regret_seconds_sum") == 0.5
    assert value(registry, "penstock_kv_mismatches_total", what="layout") == 1
    assert value(registry, "penstock_kv_load_failures_total", reason="timeout") == 1
    assert value(registry, "penstock_kv_write_behind_blocks_total", outcome="dropped") == 6


def test_a_scrape_shows_the_tiers_as_they_stood_last() -> None:
    metrics, registry = make()
    assert value(registry, "penstock_kv_tier_blocks", tier="memory") is None
    metrics.set_tiers({Tier.MEMORY: STATS})
    metrics.set_tiers({Tier.MEMORY: replace(STATS, num_blocks=9), Tier.DISK: STATS})
    assert value(registry, "penstock_kv_tier_blocks", tier="memory") == 9
    assert value(registry, "penstock_kv_tier_capacity_bytes", tier="disk") == 1000
    assert value(registry, "penstock_kv_tier_evicted_blocks_total", tier="disk") == 4
    assert value(registry, "penstock_kv_tier_errors_total", tier="memory") == 1


def test_wanted_chunks_are_counted_by_whether_they_were_coded_before() -> None:
    metrics, registry = make()
    metrics.coded_cache("miss", num_bytes=0)
    metrics.coded_cache("hit", num_bytes=700)
    metrics.coded_cache("hit", num_bytes=700)
    assert value(registry, "penstock_kv_coded_cache_chunks_total", outcome="hit") == 2
    assert value(registry, "penstock_kv_coded_cache_chunks_total", outcome="miss") == 1
    assert value(registry, "penstock_kv_coded_cache_bytes") == 700
