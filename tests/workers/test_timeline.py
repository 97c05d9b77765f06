from workers import timeline
from workers.timeline import Stamp, Timeline


def test_durations_are_none_until_both_ends_have_happened() -> None:
    line = Timeline()
    line.stamp(timeline.RECEIVED, 10.0)
    assert (line.queue_s, line.ttft_s, line.e2e_s) == (None, None, None)
    line.stamp(timeline.SCHEDULED, 10.5)
    line.stamp(timeline.FIRST_TOKEN, 12.0)
    line.stamp(timeline.FINISHED, 20.0)
    assert (line.queue_s, line.ttft_s, line.e2e_s) == (0.5, 2.0, 10.0)


def test_durations_are_of_the_first_stamp_of_a_name() -> None:
    line = Timeline()
    line.stamp(timeline.RECEIVED, 10.0)
    line.stamp(timeline.SCHEDULED, 11.0)
    line.stamp(timeline.PREEMPTED, 12.0)
    line.stamp(timeline.SCHEDULED, 13.0)
    assert line.queue_s == 1.0
    assert [stamp.name for stamp in line.stamps] == ["received", "scheduled", "preempted", "scheduled"]


def test_a_stamp_made_once_is_not_made_again() -> None:
    line = Timeline()
    assert line.stamp_once(timeline.FIRST_TOKEN, 1.0)
    assert not line.stamp_once(timeline.FIRST_TOKEN, 2.0)
    assert line.first_s(timeline.FIRST_TOKEN) == 1.0


def test_what_a_source_noted_keeps_its_time_and_gets_a_name_of_its_own() -> None:
    line = Timeline()
    line.stamp(timeline.SCHEDULED, 11.0)
    noted = (
        Stamp(timeline.RECEIVED, 9.0),
        Stamp(timeline.SCHEDULED, 10.0),
        Stamp(timeline.PREFILL_DONE, 12.0),
    )
    line.take_over(noted)
    assert line.stamps[1:] == [Stamp("prefill.scheduled", 10.0), Stamp("prefill.prefill_done", 12.0)]
    assert line.first_s(timeline.SCHEDULED) == 11.0
    assert line.first_s(timeline.PREFILL_DONE) is None


def test_clocks_that_disagree_make_no_negative_duration() -> None:
    line = Timeline()
    line.stamp(timeline.RECEIVED, 10.0)
    line.stamp(timeline.SCHEDULED, 9.9)
    assert line.queue_s == 0.0
