"""A request that moves while it generates, where two workers and a client fail and leave, in every order."""

import asyncio

import pytest

from control_plane.gateway.move import MoveOutcome
from protos import worker_pb2
from tests.control_plane.gateway.move_scene import FAILURE, HANDED_OVER, Stage

# The source goes on.


@pytest.mark.parametrize("code", [FAILURE.UNAVAILABLE, FAILURE.OVERLOADED, FAILURE.INVALID, FAILURE.INTERNAL])
async def test_when_the_target_refuses_the_source_goes_on(stage: Stage, code: int) -> None:
    scene = await stage()
    scene.target.refusal = FAILURE(code=code, message="no pages")
    report = await (await scene.begin())
    assert (report.outcome, report.detail) == (MoveOutcome.REFUSED, "no pages")
    await scene.assert_goes_on_at_source()


async def test_when_the_target_dies_the_source_goes_on(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.source.go_on(scene.at_source, first=2, num_tokens=1)
    await scene.read(3)
    await scene.target.stop()
    assert (await move).outcome is MoveOutcome.TARGET_LOST
    await scene.assert_goes_on_at_source()


@pytest.mark.parametrize("first", [0, 1, 2, 3])
async def test_a_target_with_other_tokens_is_refused(stage: Stage, first: int) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.source.go_on(scene.at_source, first=2, num_tokens=2)
    await scene.read(4)
    wrong = [*scene.expected[first:3], 49_999, scene.expected[4]]
    scene.target.output(scene.at_target.request_id, wrong, first=first)
    report = await move
    assert report.outcome is MoveOutcome.DIVERGED
    assert f"has 49999 as token 3, which was {scene.expected[3]}" in report.detail
    await scene.target_is_told_to_stop()
    await scene.assert_goes_on_at_source()


async def test_a_target_that_leaves_out_a_token_is_refused(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.target.go_on(scene.at_target, first=3, num_tokens=1)
    report = await move
    assert report.outcome is MoveOutcome.DIVERGED
    assert "begins with token 3, but token 2 is missing" in report.detail
    await scene.assert_goes_on_at_source()


async def test_a_request_that_ends_before_it_has_moved_ends_where_it_is(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.source.go_on(scene.at_source, first=2, num_tokens=6, finish=True)
    await scene.assert_is_whole()
    assert (await move).outcome is MoveOutcome.FINISHED
    await scene.target_is_told_to_stop()


async def test_a_move_that_takes_too_long_is_given_up_and_may_be_tried_again(stage: Stage) -> None:
    scene = await stage(timeout_s=0.05)
    report = await (await scene.begin())
    assert report.outcome is MoveOutcome.TIMED_OUT
    await scene.target_is_told_to_stop()
    scene.target.max_answer_tokens = None
    assert (await (await scene.begin())).outcome is MoveOutcome.MOVED
    await scene.assert_is_whole()
    assert len({submit.request_id for submit in scene.target.submits}) == 2


async def test_when_nobody_waits_for_a_move_any_more_it_is_given_up(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    move.cancel()
    with pytest.raises(asyncio.CancelledError):
        await move
    await scene.target_is_told_to_stop()
    assert [report.outcome for report in scene.moves.recent] == [MoveOutcome.ENDED]
    await scene.assert_goes_on_at_source()


# It fails as any attempt does, and is tried again.


async def test_when_the_source_dies_first_the_request_is_tried_again_from_its_tokens(stage: Stage) -> None:
    scene = await stage(max_retries=1)
    move = await scene.begin()
    first_try = scene.at_target.request_id
    scene.target.max_answer_tokens = None
    await scene.source.stop()
    await scene.assert_is_whole()
    assert (await move).outcome is MoveOutcome.SOURCE_LOST
    assert first_try in scene.target.aborts
    assert not scene.at_target.HasField("kv_source")
    assert list(scene.at_target.output_token_ids) == scene.expected[:2]


async def test_when_the_source_gives_it_up_first_it_is_tried_again(stage: Stage) -> None:
    scene = await stage(max_retries=1)
    move = await scene.begin()
    scene.target.max_answer_tokens = None
    scene.source.output(scene.at_source.request_id, [], first=0, finish_reason=worker_pb2.FINISH_ABORT)
    await scene.assert_is_whole()
    assert (await move).outcome is MoveOutcome.SOURCE_LOST


async def test_a_target_that_dies_with_all_in_its_hands_is_to_blame(stage: Stage) -> None:
    scene = await stage(max_retries=1)
    move = await scene.begin()
    scene.source.output(scene.at_source.request_id, scene.expected[2:3], first=2, finish_reason=HANDED_OVER)
    await scene.read(3)
    scene.source.max_answer_tokens = None
    await scene.target.stop()
    assert (await move).outcome is MoveOutcome.TARGET_LOST
    await scene.assert_is_whole()
    assert list(scene.source.submits[1].output_token_ids) == scene.expected[:3]


async def test_a_target_that_talks_nonsense_with_all_in_its_hands_is_to_blame(stage: Stage) -> None:
    scene = await stage(max_retries=1)
    move = await scene.begin()
    scene.source.output(scene.at_source.request_id, scene.expected[2:3], first=2, finish_reason=HANDED_OVER)
    await scene.read(3)
    scene.source.max_answer_tokens = None
    scene.target.output(scene.at_target.request_id, [49_999], first=2)
    assert (await move).outcome is MoveOutcome.DIVERGED
    await scene.assert_is_whole()
    await scene.target_is_told_to_stop()


async def test_a_target_that_is_silent_with_all_in_its_hands_is_to_blame(stage: Stage) -> None:
    scene = await stage(max_retries=1, timeout_s=0.05)
    move = await scene.begin()
    scene.source.max_answer_tokens = None
    scene.source.output(scene.at_source.request_id, [], first=2, finish_reason=HANDED_OVER)
    assert (await move).outcome is MoveOutcome.TIMED_OUT
    await scene.assert_is_whole()


async def test_a_target_that_dies_after_the_switch_is_replaced(stage: Stage) -> None:
    scene = await stage(max_retries=1)
    move = await scene.begin()
    scene.target.go_on(scene.at_target, first=2, num_tokens=2)
    await move
    await scene.read(4)
    scene.source.max_answer_tokens = None
    await scene.target.stop()
    await scene.assert_is_whole()
    assert list(scene.source.submits[1].output_token_ids) == scene.expected[:4]


# The client leaves.


async def test_a_client_that_leaves_in_the_middle_ends_it_on_both(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    await scene.stream.aclose()
    assert (await move).outcome is MoveOutcome.ENDED
    await scene.target_is_told_to_stop()
    await scene.source.until(lambda: scene.source.aborts == [scene.at_source.request_id])
    assert scene.cluster.num_requests == 0
    assert scene.moves.requests() == []


async def test_a_client_that_leaves_between_hand_over_and_first_token_ends_it_at_the_target(
    stage: Stage,
) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.source.output(scene.at_source.request_id, scene.expected[2:3], first=2, finish_reason=HANDED_OVER)
    await scene.read(3)
    await scene.stream.aclose()
    assert (await move).outcome is MoveOutcome.ENDED
    await scene.target_is_told_to_stop()
    assert scene.cluster.num_requests == 0


async def test_a_client_that_leaves_after_the_switch_ends_it_at_the_target(stage: Stage) -> None:
    scene = await stage()
    move = await scene.begin()
    scene.target.go_on(scene.at_target, first=2, num_tokens=1)
    await move
    await scene.stream.aclose()
    await scene.target_is_told_to_stop()
    assert scene.cluster.num_requests == 0
