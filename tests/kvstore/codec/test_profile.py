from pathlib import Path

import pytest

from kvstore.codec.codec import KvCodec
from kvstore.codec.levels import NUM_CACHEGEN_LEVELS
from kvstore.codec.profile import load_profile, make_profile
from kvstore.errors import ProfileMismatch
from tests.kvstore.codec.coding import FINGERPRINT, arena_of, layout_of, profile_content, profile_of

LAYOUT = layout_of("float32")


def test_a_model_without_a_profile_has_none(tmp_path: Path) -> None:
    assert load_profile(tmp_path / "missing", fingerprint=FINGERPRINT, layout=LAYOUT) is None


def test_the_same_samples_give_the_same_profile(tmp_path: Path) -> None:
    first, other = profile_of(LAYOUT, tmp_path), profile_of(LAYOUT, tmp_path, seed=2)
    assert len(first.digest) == 16
    assert first.digest == profile_of(LAYOUT, tmp_path).digest
    assert first.digest != other.digest
    assert len(first.levels) == len(first.bits_per_level) == NUM_CACHEGEN_LEVELS


def test_a_profile_makes_chunks_smaller(tmp_path: Path) -> None:
    arena = arena_of(LAYOUT, num_blocks=16, seed=9)
    with_profile, without = (
        KvCodec(LAYOUT, profile=profile_of(LAYOUT, tmp_path)),
        KvCodec(LAYOUT, profile=None),
    )
    for level in range(1, NUM_CACHEGEN_LEVELS + 1):
        assert len(with_profile.encode(arena, range(16), level=level)) < len(
            without.encode(arena, range(16), level=level)
        )


def test_the_profile_of_another_model_is_a_mismatch(tmp_path: Path) -> None:
    path = tmp_path / "profile"
    path.write_bytes(profile_content(LAYOUT, fingerprint=b"g" * 32))
    with pytest.raises(ProfileMismatch, match=(b"g" * 32).hex()):
        load_profile(path, fingerprint=FINGERPRINT, layout=LAYOUT)


def test_the_profile_of_another_layout_is_a_mismatch(tmp_path: Path) -> None:
    path = tmp_path / "profile"
    path.write_bytes(profile_content(LAYOUT))
    with pytest.raises(ProfileMismatch, match="layout"):
        load_profile(path, fingerprint=FINGERPRINT, layout=layout_of("float32", head_dim=16))


def test_a_profile_of_another_version_is_a_mismatch(tmp_path: Path) -> None:
    path = tmp_path / "profile"
    path.write_bytes(profile_content(LAYOUT).replace(b"penstock-kv-profile-1", b"penstock-kv-profile-9"))
    with pytest.raises(ProfileMismatch, match="penstock-kv-profile-9"):
        load_profile(path, fingerprint=FINGERPRINT, layout=LAYOUT)


def test_a_profile_cut_anywhere_is_a_mismatch(tmp_path: Path) -> None:
    path, content = tmp_path / "profile", profile_content(LAYOUT)
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ProfileMismatch, match="not a whole profile"):
            load_profile(path, fingerprint=FINGERPRINT, layout=LAYOUT)


def test_tables_that_do_not_add_up_are_a_mismatch(tmp_path: Path) -> None:
    """The entropy coder relies on the sums."""
    path, content = tmp_path / "profile", bytearray(profile_content(LAYOUT))
    content[-1000:] = bytes(1000)
    path.write_bytes(content)
    with pytest.raises(ProfileMismatch, match="not a whole profile"):
        load_profile(path, fingerprint=FINGERPRINT, layout=LAYOUT)


def test_key_factors_make_the_bins_of_a_layers_keys_narrower(tmp_path: Path) -> None:
    arena = arena_of(LAYOUT, num_blocks=20)
    path, widths = tmp_path / "profile", []
    for factors in ((), (1.0, 0.5, 1.0)):
        path.write_bytes(
            make_profile(arena, [range(20)], fingerprint=FINGERPRINT, layout=LAYOUT, key_factors=factors)
        )
        found = load_profile(path, fingerprint=FINGERPRINT, layout=LAYOUT)
        assert found is not None
        widths.append(found.levels[-1].bins.delta_bin_GC.reshape(LAYOUT.num_layers, 2, -1))
    ratio = widths[1] / widths[0]
    assert ratio[1, 0].max() < 1
    assert ratio[1, 0].min() == pytest.approx(0.5, rel=1e-3)
    assert (ratio[[0, 2]] == 1).all()
    assert (ratio[:, 1] == 1).all()


@pytest.mark.parametrize("factors", [(1.0,), (1.0, 0.0, 1.0), (1.0, -1.0, 1.0)])
def test_key_factors_are_a_positive_number_for_each_layer(factors: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="key factors are 3 positive numbers"):
        make_profile(
            arena_of(LAYOUT, num_blocks=2),
            [range(2)],
            fingerprint=FINGERPRINT,
            layout=LAYOUT,
            key_factors=factors,
        )
