from dataclasses import replace

import pytest

from workers.engine.pool_size import MeasuredMemory, num_pages_that_fit

# 100 of which others hold 10; torch has 50, of which 40 are weights.
MEMORY = MeasuredMemory(total=100, free=40, reserved=50, allocated=40, step=12, captured=3)


def test_pages_take_what_the_share_leaves_after_weights_steps_and_what_others_hold() -> None:
    assert num_pages_that_fit(MEMORY, share=0.9, page_bytes=5) == (90 - 10 - 40 - 12 - 3) // 5


def test_what_torch_has_reserved_without_tensors_in_it_counts_for_nothing() -> None:
    hoarding = replace(MEMORY, reserved=70, free=20)
    assert num_pages_that_fit(hoarding, share=0.9, page_bytes=5) == num_pages_that_fit(
        MEMORY, share=0.9, page_bytes=5
    )


def test_another_process_takes_pages_away() -> None:
    crowded = replace(MEMORY, free=30)
    assert num_pages_that_fit(crowded, share=0.9, page_bytes=5) == 3


def test_no_room_for_two_pages_is_an_error_that_says_what_took_it() -> None:
    with pytest.raises(ValueError, match="leave 25 for pages of 13, after 40 of weights, 15 of steps and 10"):
        num_pages_that_fit(MEMORY, share=0.9, page_bytes=13)


@pytest.mark.parametrize("share", [0, -0.1, 1.01])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"got {share}"):
        num_pages_that_fit(MEMORY, share=share, page_bytes=1)
