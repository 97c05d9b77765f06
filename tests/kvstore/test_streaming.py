import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import BLOCK_SIZE_TOKENS
from kvstore.stream_estimates import PRIOR_THROUGHPUT_BYTES_S, LevelEstimates, LinkEstimate
from kvstore.streaming import LevelCost, StreamLimits, StreamPlan, StreamView, plan_stream, regret_s

ALL = StreamLimits(max_level=99)
RAW = LevelCost(level=0, bytes_per_token=4096)
FINE = LevelCost(level=1, bytes_per_token=700, decode_s_per_token=2e-5)
COARSE = LevelCost(level=2, bytes_per_token=300, decode_s_per_token=2e-5)
CHUNK_BLOCKS = 16
CHUNK_TOKENS = CHUNK_BLOCKS * BLOCK_SIZE_TOKENS


def make_view(
    *,
    num_chunks: int = 16,
    compute_s_per_token: float = 2e-4,
    throughput_bytes_s: float = 12.5e6,
    **fields: object,
) -> StreamView:
    return StreamView(
        **{
            "chunk_blocks": [CHUNK_BLOCKS] * num_chunks,
            "compute_s": [compute_s_per_token * CHUNK_TOKENS] * num_chunks,
            "first_chunk": 0,
            "end_chunk": num_chunks,
            "levels": (RAW, FINE, COARSE),
            "throughput_bytes_s": throughput_bytes_s,
            "time_left_s": 0.0,
            **fields,
        }
    )


@st.composite
def views(draw: st.DrawFn) -> StreamView:
    seconds = st.floats(0, 2)
    sizes = draw(st.lists(st.integers(1, 32), max_size=12))
    end_chunk = draw(st.integers(0, len(sizes)))
    per_token = draw(st.lists(st.floats(1.0, 1e5), min_size=1, max_size=4))
    return StreamView(
        chunk_blocks=sizes,
        compute_s=[draw(st.floats(0, 1)) for _ in sizes],
        first_chunk=draw(st.integers(0, end_chunk)),
        end_chunk=end_chunk,
        levels=tuple(
            LevelCost(
                level=number,
                bytes_per_token=num_bytes,
                prepare_s_per_token=draw(st.floats(0, 1e-3)),
                decode_s_per_token=draw(st.floats(0, 1e-3)),
            )
            for number, num_bytes in enumerate(sorted(per_token, reverse=True))
        ),
        throughput_bytes_s=draw(st.floats(1e4, 1e9)),
        latency_s=draw(seconds),
        pending_s=draw(seconds),
        queue_s=draw(seconds),
        tail_s=draw(seconds),
        time_left_s=draw(st.floats(-1, 10)),
    )


def changed(view: StreamView, **fields: object) -> StreamView:
    kept = {name: getattr(view, name) for name in StreamView.__slots__}
    return StreamView(**{**kept, **fields})


def only(level: int, view: StreamView) -> StreamPlan:
    return plan_stream(changed(view, levels=[cost for cost in view.levels if cost.level == level]), ALL)


@given(views())
def test_no_level_is_predicted_slower_than_loading_all_or_computing_all(view: StreamView) -> None:
    for cost in view.levels:
        plan = only(cost.level, view)
        assert plan.predicted_s <= min(plan.predicted_load_s, plan.predicted_recompute_s) + 1e-9


@given(views())
def test_what_misses_the_objective_is_about_the_fastest_there_is(view: StreamView) -> None:
    plan = plan_stream(view, ALL)
    if plan.predicted_s > view.time_left_s:
        fastest_s = min(only(cost.level, view).predicted_s for cost in view.levels)
        assert plan.predicted_s <= 1.15 * fastest_s + 1e-9
        assert plan.predicted_s <= min(plan.predicted_load_s, plan.predicted_recompute_s) + 1e-9


@given(views())
def test_a_less_lossy_level_would_miss_the_objective(view: StreamView) -> None:
    plan = plan_stream(view, ALL)
    if plan.predicted_s <= view.time_left_s:
        better = [cost.level for cost in view.levels if cost.level < plan.level]
        assert all(only(level, view).predicted_s > view.time_left_s for level in better)


@given(views())
def test_no_split_is_much_better_than_the_chosen_one(view: StreamView) -> None:
    for cost in view.levels:
        plan = only(cost.level, view)
        for split in range(view.first_chunk, view.end_chunk + 1):
            # With the chunks before the split gone, all loaded is this split without its computing.
            loaded_s = only(cost.level, changed(view, first_chunk=split, tail_s=0.0)).predicted_load_s
            computed_s = view.queue_s + sum(view.compute_s[view.first_chunk : split])
            assert plan.predicted_s <= 1.15 * (max(loaded_s, computed_s) + view.tail_s) + 1e-9


@given(views(), st.floats(1, 100))
def test_a_faster_link_never_ends_much_later_and_is_never_more_lossy(view: StreamView, factor: float) -> None:
    faster = changed(view, throughput_bytes_s=view.throughput_bytes_s * factor)
    for cost in view.levels:
        assert only(cost.level, faster).predicted_s <= 1.15 * only(cost.level, view).predicted_s + 1e-9
    before, after = plan_stream(view, ALL), plan_stream(faster, ALL)
    if before.predicted_s <= view.time_left_s:
        assert after.level <= before.level


@given(views(), st.floats(0, 10))
def test_more_time_is_never_more_lossy(view: StreamView, slack_s: float) -> None:
    before = plan_stream(view, ALL)
    after = plan_stream(changed(view, time_left_s=view.time_left_s + slack_s), ALL)
    if before.predicted_s <= view.time_left_s:
        assert after.level <= before.level


@given(views(), st.integers(0, 4))
def test_no_level_beyond_the_limit_is_used(view: StreamView, max_level: int) -> None:
    assert plan_stream(view, StreamLimits(max_level=max_level)).level <= max_level


@given(views())
def test_the_choice_says_what_the_split_means(view: StreamView) -> None:
    plan = plan_stream(view, ALL)
    assert view.first_chunk <= plan.split <= view.end_chunk
    if view.first_chunk < view.end_chunk:
        expected = {view.first_chunk: "load", view.end_chunk: "recompute"}.get(plan.split, "mixed")
        assert plan.choice == expected


def test_a_fast_link_loads_all_of_it_raw() -> None:
    plan = plan_stream(make_view(throughput_bytes_s=1e10, time_left_s=0.5), ALL)
    assert (plan.split, plan.level, plan.choice) == (0, 0, "load")


def test_a_dead_link_computes_all_of_it() -> None:
    plan = plan_stream(make_view(throughput_bytes_s=1e3), ALL)
    assert (plan.split, plan.choice) == (16, "recompute")
    assert plan.predicted_s == pytest.approx(16 * CHUNK_TOKENS * 2e-4)


def test_a_link_as_fast_as_the_engine_shares_the_work_with_it() -> None:
    # Raw at 20.48 MB/s: 5,000 tokens/s, as the engine. Together they take half as long.
    view = make_view(throughput_bytes_s=20.48e6, levels=(RAW,))
    plan = plan_stream(view, ALL)
    assert (plan.split, plan.choice) == (8, "mixed")
    assert plan.predicted_s == pytest.approx(plan.predicted_recompute_s / 2)


def test_the_level_follows_the_objective() -> None:
    """On 100 Mbit/s, raw alone takes 1.3 s, the fine level 0.23 s, the coarse one 0.1 s."""
    levels = [
        plan_stream(make_view(compute_s_per_token=1.0, time_left_s=time_left_s), ALL).level
        for time_left_s in (2.0, 0.5, 0.15, 0.001)
    ]
    assert levels == [0, 1, 2, 2]


def test_while_the_prompt_queues_more_is_loaded() -> None:
    """The link has that time for itself."""
    splits = [
        plan_stream(make_view(levels=(RAW,), queue_s=queue_s), ALL).split for queue_s in (0.0, 0.5, 1.5)
    ]
    assert splits == sorted(splits, reverse=True)
    assert splits[0] > splits[-1] == 0


def test_computing_a_part_must_be_worth_it() -> None:
    """Loading takes 1 s in all; what the engine could take off it is not much, or much."""
    cost = LevelCost(level=0, bytes_per_token=1e6 / (16 * CHUNK_TOKENS))
    splits = [
        plan_stream(make_view(levels=(cost,), throughput_bytes_s=1e6, compute_s_per_token=seconds), ALL).split
        for seconds in (0.2 / CHUNK_TOKENS, 1.0 / CHUNK_TOKENS, 2.0 / CHUNK_TOKENS)
    ]
    assert splits[0] > 0
    assert splits[1:] == [0, 0]


def test_nothing_more_is_asked_for_once_the_engine_has_come_so_far() -> None:
    plan = plan_stream(make_view(first_chunk=5, end_chunk=5, pending_s=0.25, tail_s=0.5), ALL)
    assert plan.split == 5
    assert plan.predicted_s == 0.75


def test_a_source_that_prepares_slowly_is_no_slow_link() -> None:
    slow_coder = LevelCost(level=1, bytes_per_token=700, prepare_s_per_token=1e-3)
    plan = plan_stream(make_view(throughput_bytes_s=625e6, levels=(RAW, slow_coder)), ALL)
    assert (plan.level, plan.choice) == (0, "load")


def test_a_source_without_an_allowed_level_is_an_error() -> None:
    with pytest.raises(ValueError, match="no level up to 0"):
        plan_stream(make_view(levels=(FINE,)), StreamLimits(max_level=0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compute_s": [1.0]}, "16 chunks, but computing times of 1"),
        ({"first_chunk": 9, "end_chunk": 8}, "in this order"),
        ({"end_chunk": 17}, "within 16 chunks"),
        ({"throughput_bytes_s": 0.0}, "throughput_bytes_s must be positive, got 0"),
    ],
)
def test_a_view_that_cannot_be_is_an_error(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_view(**fields)


def test_a_level_that_costs_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="a token takes bytes"):
        LevelCost(level=0, bytes_per_token=0)


def test_regret_is_what_the_best_choice_in_hindsight_would_have_saved() -> None:
    hindsight = plan_stream(make_view(throughput_bytes_s=1e3), ALL)
    assert regret_s(hindsight.predicted_recompute_s, hindsight) == 0.0
    assert regret_s(hindsight.predicted_recompute_s + 2.0, hindsight) == pytest.approx(2.0)
    assert regret_s(0.0, hindsight) == 0.0


class SimulatedLoad:
    """A load as the loader runs it: one chunk at a time from the back, on a link whose speed changes with time.

    What is decided and learned is the real thing; the link, the engine and the clock are arithmetic.
    """

    def __init__(self, speeds: list[tuple[float, float]], *, compute_s_per_token: float = 1e-3) -> None:
        self.speeds = speeds  # from this second on, so many bytes a second
        self.compute_s = compute_s_per_token * CHUNK_TOKENS
        self.link = LinkEstimate()
        self.now_s = 0.0
        self.plans: list[StreamPlan] = []

    def run(self, *, num_chunks: int = 32) -> float:
        """When the last chunk is here or computed."""
        end_chunk = num_chunks
        while (first_chunk := min(end_chunk, int(self.now_s / self.compute_s))) < end_chunk:
            view = make_view(
                num_chunks=num_chunks,
                compute_s_per_token=self.compute_s / CHUNK_TOKENS,
                throughput_bytes_s=self.link.throughput_bytes_s(now_s=self.now_s),
                first_chunk=first_chunk,
                end_chunk=end_chunk,
                queue_s=0.0,
            )
            self.plans.append(plan := plan_stream(view, ALL))
            if plan.split == end_chunk:
                break
            end_chunk -= 1
            num_bytes = view.levels[plan.level].bytes_per_token * CHUNK_TOKENS
            arrived_s = self._arrival(num_bytes)
            computed_s = (end_chunk + 1) * self.compute_s
            self.link.received(int(num_bytes), receive_s=arrived_s - self.now_s, now_s=arrived_s)
            self.now_s = min(arrived_s, computed_s)  # the engine does not wait for what it can compute
            if arrived_s > computed_s:
                return computed_s
        return max(self.now_s, end_chunk * self.compute_s)

    def _arrival(self, num_bytes: float) -> float:
        now_s, left = self.now_s, num_bytes
        for (start_s, speed), (stop_s, _) in zip(self.speeds, [*self.speeds[1:], (1e9, 0.0)], strict=True):
            if now_s >= stop_s:
                continue
            now_s = max(now_s, start_s)
            if left <= (stop_s - now_s) * speed:
                return now_s + left / speed
            left -= (stop_s - now_s) * speed
            now_s = stop_s
        raise AssertionError("the link never ends")


def test_a_link_that_collapses_hands_the_rest_to_the_engine() -> None:
    load = SimulatedLoad([(0.0, 12.5e6), (0.1, 1e5)])
    ended_s = load.run()
    loaded_before = 0.1 * 12.5e6 / (COARSE.bytes_per_token * CHUNK_TOKENS)
    best_s = (32 - loaded_before) * load.compute_s
    assert ended_s <= 1.1 * best_s
    assert load.plans[0].choice == "load"
    assert len(load.plans) < 24  # the engine had the rest


def test_a_link_that_recovers_is_used() -> None:
    slow_s = 1.0
    load = SimulatedLoad([(0.0, 2e5), (slow_s, 125e6)])
    ended_s = load.run()
    # Without the recovery the engine would still compute; with it the rest is here at once.
    assert load.plans[0].predicted_s > 2.0 or load.plans[1].predicted_s > 2.0
    assert ended_s <= slow_s + 3 * load.compute_s


def test_the_estimate_follows_a_jump_within_two_chunks() -> None:
    link = LinkEstimate()
    for second in range(10):
        link.received(1_000_000, receive_s=0.1, now_s=float(second))
    for speed, low, high in ((1e8, 5e7, 1e8), (1e8, 8e7, 1e8), (1e6, 1e6, 4e6), (1e6, 1e6, 1.5e6)):
        link.received(1_000_000, receive_s=1_000_000 / speed, now_s=10.0)
        assert low <= link.throughput_bytes_s(now_s=10.0) <= high


def test_an_unknown_link_is_taken_for_a_gigabit_and_an_old_measurement_fades_to_that() -> None:
    link = LinkEstimate()
    assert link.throughput_bytes_s(now_s=5.0) == PRIOR_THROUGHPUT_BYTES_S
    link.received(1_000_000, receive_s=10.0, now_s=5.0)
    assert link.throughput_bytes_s(now_s=5.0) == pytest.approx(1e5)
    later = [link.throughput_bytes_s(now_s=5.0 + age_s) for age_s in (10.0, 60.0, 600.0)]
    assert later == sorted(later)
    assert later[-1] == pytest.approx(PRIOR_THROUGHPUT_BYTES_S, rel=0.01)


def test_a_wait_before_a_chunk_bounds_the_link_and_measures_nothing() -> None:
    link = LinkEstimate()
    link.received(1_000_000, receive_s=0.001, waited_s=0.1, now_s=0.0)
    assert link.throughput_bytes_s(now_s=0.0) == PRIOR_THROUGHPUT_BYTES_S
    link.received(1_000_000, receive_s=0.1, waited_s=0.1, now_s=0.0)
    assert 1e7 <= link.throughput_bytes_s(now_s=0.0) < 2e7
    link.received(1_000_000, receive_s=0.0001, waited_s=0.0001, now_s=0.0)
    assert 1e9 < link.throughput_bytes_s(now_s=0.0) <= 5e9


def test_a_few_bytes_say_nothing_about_a_link() -> None:
    link = LinkEstimate()
    link.received(100, receive_s=1.0, now_s=0.0)
    assert link.throughput_bytes_s(now_s=0.0) == PRIOR_THROUGHPUT_BYTES_S


def test_a_chunk_that_does_not_come_says_how_slow_the_link_is_at_most() -> None:
    link = LinkEstimate()
    link.received(1_000_000, receive_s=0.01, now_s=0.0)
    link.overdue(1_000_000, waited_s=0.001, now_s=0.0)
    assert link.throughput_bytes_s(now_s=0.0) == pytest.approx(1e8)
    link.overdue(1_000_000, waited_s=2.0, now_s=2.0)
    assert link.throughput_bytes_s(now_s=2.0) == pytest.approx(5e5)


def test_the_latency_is_a_running_mean_of_answers() -> None:
    link = LinkEstimate()
    assert link.latency_s == 0.001
    link.answered(0.1)
    assert link.latency_s == 0.1
    link.answered(0.2)
    assert link.latency_s == pytest.approx(0.15)


def test_what_a_level_costs_is_measured() -> None:
    levels = LevelEstimates((RAW, FINE))
    seconds = {"decode": 0.512}
    levels.observe(1, num_tokens=256, coded_bytes=256 * 500, seconds=seconds)
    assert levels.costs() == (
        RAW,
        LevelCost(level=1, bytes_per_token=500, decode_s_per_token=0.002),
    )
    levels.observe(1, num_tokens=256, coded_bytes=256 * 600, seconds={})
    assert levels.costs()[1].bytes_per_token == 550
    assert levels.costs()[1].decode_s_per_token == 0.002
