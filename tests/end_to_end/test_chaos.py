"""A storm of one minute: no client notices, and nothing is left behind.

What comes first in each lane surely happens, so much is in the seed; `make bench BENCH=chaos` is the long one, which
has something of every kind.
"""

import pytest

from bench.chaos import print_result, run

SEED = 1
STORM_S = 60.0


@pytest.mark.timeout(300)
def test_no_token_is_lost_duplicated_or_wrong_and_nothing_leaks_in_a_storm() -> None:
    result = run(shape="disaggregated", seed=SEED, lasts_s=STORM_S)
    print_result(result)
    assert {claim.name: claim.value for claim in result.claims} == dict.fromkeys(
        ("lost", "duplicated", "wrong", "leaked", "client_failures"), 0
    )
    first = {"worker killed", "worker drained", "gateway killed", "Redis stopped", "request moved"}
    assert first <= result.events.keys()
