import pytest

from workers.engine.decode_buckets import bucket_for, decode_buckets


@pytest.mark.parametrize("max_rows", [1, 2, 3, 7, 8, 9, 63, 64, 65, 200, 256])
def test_every_batch_has_a_bucket_that_pads_it_by_less_than_32_and_less_than_its_double(
    max_rows: int,
) -> None:
    buckets = decode_buckets(max_rows)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == max_rows
    for num_rows in range(1, max_rows + 1):
        bucket = bucket_for(num_rows, buckets)
        assert num_rows <= bucket < min(2 * num_rows, num_rows + 32) or bucket == num_rows


@pytest.mark.parametrize("num_rows", [0, 17])
def test_a_batch_that_no_bucket_holds_is_refused(num_rows: int) -> None:
    with pytest.raises(ValueError, match=f"{num_rows} rows do not fit"):
        bucket_for(num_rows, decode_buckets(16))
