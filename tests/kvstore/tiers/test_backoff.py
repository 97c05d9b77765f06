from kvstore.tiers.backoff import FIRST_PAUSE_S, MAX_PAUSE_S, Backoff


def test_nothing_pauses_before_a_failure() -> None:
    assert Backoff().pause_left_s(now_s=5) == 0


def test_pauses_grow_to_a_bound_and_a_success_ends_them() -> None:
    backoff, now_s, pauses = Backoff(), 100.0, []
    for _ in range(10):
        backoff.failed(now_s=now_s)
        pauses.append(backoff.pause_left_s(now_s=now_s))
        now_s += pauses[-1]
        assert backoff.pause_left_s(now_s=now_s) == 0
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == MAX_PAUSE_S
    backoff.succeeded()
    assert backoff.pause_left_s(now_s=now_s) == 0
    backoff.failed(now_s=now_s)
    assert backoff.pause_left_s(now_s=now_s) == FIRST_PAUSE_S


def test_a_clock_that_is_set_back_ends_the_pause() -> None:
    backoff = Backoff()
    backoff.failed(now_s=1_000_000)
    assert backoff.pause_left_s(now_s=10) == 0
