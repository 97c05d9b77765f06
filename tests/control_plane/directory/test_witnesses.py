from control_plane.directory.member import WorkerId
from control_plane.directory.witnesses import (
    TTLS_THROUGH_OTHERS,
    TTLS_WITHOUT_A_GATEWAY,
    Witnesses,
)

TTL_S = 2.0
W = WorkerId("w")


def make_witnesses() -> Witnesses:
    """Of the gateway "own"; the worker was heard through "other" at 0."""
    witnesses = Witnesses(gateway_id="own", ttl_s=TTL_S)
    for gateway_id in ("own", "other"):
        witnesses.saw(gateway_id, number=1, now_s=0.0)
    witnesses.heard(W, through="other", now_s=0.0)
    return witnesses


def run(witnesses: Witnesses, *gateway_ids: str, from_s: float, until_s: float, number: int = 2) -> None:
    """Those gateways give signs of life, one a second."""
    while from_s <= until_s:
        for gateway_id in gateway_ids:
            witnesses.saw(gateway_id, number=number, now_s=from_s)
        from_s, number = from_s + 1.0, number + 1


def may_be_dead(witnesses: Witnesses, *, now_s: float, is_reached: bool = False) -> bool:
    return witnesses.may_be_dead(W, now_s=now_s, is_reached=is_reached)


def test_a_worker_of_our_own_is_as_dead_as_it_is_silent() -> None:
    witnesses = make_witnesses()
    witnesses.heard(W, through="own", now_s=1.0)
    assert may_be_dead(witnesses, now_s=1.1)


def test_a_worker_of_our_own_that_we_reach_may_have_moved_until_the_stream_would_tell() -> None:
    witnesses = make_witnesses()
    witnesses.heard(W, through="own", now_s=0.0)
    assert not may_be_dead(witnesses, now_s=1e6, is_reached=True)
    run(witnesses, "own", from_s=1e6, until_s=1e6 + TTLS_THROUGH_OTHERS * TTL_S)
    assert not may_be_dead(witnesses, now_s=1e6 + TTLS_THROUGH_OTHERS * TTL_S - 0.1, is_reached=True)
    assert may_be_dead(witnesses, now_s=1e6 + TTLS_THROUGH_OTHERS * TTL_S, is_reached=True)


def test_a_worker_of_whom_a_living_gateway_says_nothing_may_be_dead() -> None:
    witnesses = make_witnesses()
    run(witnesses, "own", "other", from_s=1.0, until_s=TTLS_THROUGH_OTHERS * TTL_S)
    assert not may_be_dead(witnesses, now_s=TTLS_THROUGH_OTHERS * TTL_S - 0.1)
    assert may_be_dead(witnesses, now_s=TTLS_THROUGH_OTHERS * TTL_S)


def test_a_worker_whose_gateway_died_has_time_to_find_another() -> None:
    witnesses = make_witnesses()
    run(witnesses, "own", from_s=1.0, until_s=TTLS_WITHOUT_A_GATEWAY * TTL_S)
    assert not may_be_dead(witnesses, now_s=TTLS_WITHOUT_A_GATEWAY * TTL_S - 0.1)
    assert may_be_dead(witnesses, now_s=TTLS_WITHOUT_A_GATEWAY * TTL_S)


def test_while_we_do_not_read_our_own_entries_silence_means_nothing_and_neither_right_after() -> None:
    witnesses = make_witnesses()
    assert not may_be_dead(witnesses, now_s=1e6)
    run(witnesses, "own", "other", from_s=1e6, until_s=1e6 + 3.0)
    assert not may_be_dead(witnesses, now_s=1e6 + 3.0)
    run(witnesses, "own", "other", from_s=1e6 + 4.0, until_s=1e6 + 4.0, number=6)
    assert may_be_dead(witnesses, now_s=1e6 + TTLS_THROUGH_OTHERS * TTL_S)


def test_numbers_tell_what_was_missed() -> None:
    witnesses = make_witnesses()
    assert witnesses.saw("other", number=2, now_s=0.0) is False
    assert witnesses.saw("other", number=2, now_s=0.0) is None
    assert witnesses.saw("other", number=4, now_s=0.0) is True
    assert witnesses.saw("young", number=1, now_s=0.0) is False
    assert witnesses.saw("old", number=7, now_s=0.0) is True


def test_nobody_is_asked_twice_in_a_ttl() -> None:
    witnesses = make_witnesses()
    assert witnesses.may_ask("other", now_s=1.0)
    assert not witnesses.may_ask("other", now_s=2.9)
    assert witnesses.may_ask("other", now_s=3.0)
    witnesses.asks_everybody(now_s=10.0)
    assert not witnesses.may_ask("other", now_s=11.0)
    assert not witnesses.may_ask("stranger", now_s=99.0)


def test_gateways_of_the_past_are_forgotten() -> None:
    witnesses = make_witnesses()
    late_s = 10 * TTLS_WITHOUT_A_GATEWAY * TTL_S
    assert witnesses.saw("new", number=1, now_s=late_s) is False
    assert witnesses.saw("other", number=2, now_s=late_s) is True  # as one never seen
