"""How many bytes a block has."""

import pytest

from kvstore.layout import KvLayout


def layout_of(dtype: str) -> KvLayout:
    return KvLayout(num_layers=3, num_kv_heads=2, head_dim=8, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "layer_bytes"),
    [
        ("float32", 2 * 2 * 16 * 8 * 4),
        ("bfloat16", 2 * 2 * 16 * 8 * 2),
        ("int8", 2 * 2 * 16 * (8 + 4)),
        ("fp8", 2 * 2 * 16 * (8 + 4)),
    ],
)
def test_a_block_has_its_numbers_and_a_scale_for_each_row_of_8_bits(dtype: str, layer_bytes: int) -> None:
    layout = layout_of(dtype)
    assert (layout.layer_block_bytes, layout.block_bytes) == (layer_bytes, 3 * layer_bytes)
    assert layout.bytes_per_value * 2 * 2 * 16 * 8 == layer_bytes


def test_another_dtype_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, int8, fp8, got 'int4'"):
        layout_of("int4")
