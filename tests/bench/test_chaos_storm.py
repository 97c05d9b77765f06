"""What a storm does is fixed by its seed, and what it did to an answer is told apart."""

from collections import Counter
from itertools import islice

import pytest

from bench.chaos_storm import WORKER_KINDS, Difference, Lane, difference, disturbances

LANE = Lane("decode", WORKER_KINDS, ["decode-0", "decode-1"])
ANSWER = list("abcdefgh")


def test_one_seed_is_one_storm_and_another_seed_another() -> None:
    first, again, other = (list(islice(disturbances(LANE, seed=seed), 20)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_lanes_of_one_storm_differ() -> None:
    other = Lane("prefill", LANE.kinds, LANE.targets)
    both = [[one.kind for one in islice(disturbances(lane, seed=1), 20)] for lane in (LANE, other)]
    assert both[0] != both[1]


def test_every_kind_comes_up_before_any_does_again() -> None:
    kinds = Counter(one.kind for one in islice(disturbances(LANE, seed=3), 3 * len(WORKER_KINDS)))
    assert kinds == dict.fromkeys(WORKER_KINDS, 3)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("abcdefgh", Difference()),
        ("abcfgh", Difference(num_lost=2)),
        ("abcdef", Difference(num_lost=2)),
        ("", Difference(num_lost=8)),
        ("abcdcdefgh", Difference(num_duplicated=2)),
        ("abcdefghgh", Difference(num_duplicated=2)),
        ("abXdefgh", Difference(num_wrong=1)),
        ("abXYefg", Difference(num_lost=1, num_wrong=2)),
    ],
)
def test_tokens_are_lost_duplicated_or_wrong(found: str, expected: Difference) -> None:
    assert difference(list(found), ANSWER) == expected
