import numpy as np
import pytest

from kvstore.codec.channels import VALUES_PER_KEYS_BIN, KvStatistics
from kvstore.codec.levels import CACHEGEN_BINS, NUM_CACHEGEN_LEVELS
from kvstore.codec.quantize import MAX_STEPS, quantize
from tests.kvstore.codec.coding import layout_of, values_of

LAYOUT = layout_of("float32")


def test_finds_means_and_how_far_channels_reach() -> None:
    values = values_of(LAYOUT, num_tokens=200)
    known = KvStatistics.of([values[:, :80], values[:, 80:]], layout=LAYOUT)
    np.testing.assert_allclose(known.mean_GC, values.mean(axis=1), atol=1e-4)
    np.testing.assert_allclose(known.reach_GC, np.abs(values - known.mean_GC[:, None]).max(axis=1), rtol=1e-5)


def test_tokens_unlike_their_neighbours_have_alpha_0_and_equal_ones_alpha_1() -> None:
    noise = np.random.default_rng(0).normal(size=(12, 20_000, 8)).astype(np.float32)
    assert KvStatistics.of([noise], layout=LAYOUT).alpha_GC.max() < 0.1
    constant = np.repeat(noise[:, :100], 10, axis=1)
    np.testing.assert_allclose(KvStatistics.of([constant], layout=LAYOUT).alpha_GC, 1, atol=1e-3)


def test_bins_follow_the_level_and_are_wider_for_values_than_for_keys() -> None:
    noise = np.random.default_rng(0).normal(size=(12, 2000, 8)).astype(np.float32)
    known = KvStatistics.of([noise], layout=LAYOUT)
    bins = known.bins(level=NUM_CACHEGEN_LEVELS).delta_bin_GC.reshape(3, 2, -1)
    np.testing.assert_allclose(bins[:, 0], CACHEGEN_BINS[-1], rtol=0.05)
    np.testing.assert_allclose(bins[:, 1] / bins[:, 0], VALUES_PER_KEYS_BIN, rtol=0.05)


@pytest.mark.parametrize("level", range(1, NUM_CACHEGEN_LEVELS + 1))
def test_a_channel_of_outliers_gets_bins_that_reach_them(level: int) -> None:
    values = values_of(LAYOUT, num_tokens=160)
    values[3, :, 5] *= 100
    known = KvStatistics.of([values], layout=LAYOUT)
    bins = known.bins(level=level)
    assert bins.delta_bin_GC[3, 5] * MAX_STEPS > known.reach_GC[3, 5]
    assert bins.delta_bin_GC[3, 5] > 10 * np.median(bins.delta_bin_GC)


def test_a_channel_that_never_moves_has_bins() -> None:
    arena = np.zeros((2, LAYOUT.block_bytes), np.uint8)
    known = KvStatistics.of([np.zeros((12, 32, 8), np.float32)], layout=LAYOUT)
    bins = known.bins(level=1)
    assert bins.delta_bin_GC.min() > 0
    anchors, deltas = quantize(arena, [0, 1], bins, layout=LAYOUT)
    assert (anchors == MAX_STEPS).all()
    assert (deltas == MAX_STEPS).all()


def test_fewer_tokens_than_a_group_have_statistics() -> None:
    known = KvStatistics.of([values_of(LAYOUT, num_tokens=5)], layout=LAYOUT)
    assert np.isfinite(known.alpha_GC).all()
