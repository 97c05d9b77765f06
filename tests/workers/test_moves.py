"""Who may move, and how much room is made for it."""

from workers.moves import MAX_LOGPROBS, Room, keep_logprobs, must_freeze, pages_for_move
from workers.request import Request, RequestId, SamplingParams, SessionId, TokenLogprobs


def request(*, num_tokens: int, **sampling: int) -> Request:
    return Request(
        request_id=RequestId("r"),
        session_id=SessionId(1),
        prompt_token_ids=[5] * num_tokens,
        sampling=SamplingParams(**({"max_tokens": 1000} | sampling)),
        arrival_s=0.0,
    )


def test_room_to_grow_is_a_wish_and_room_for_what_is_known_a_need() -> None:
    moving = request(num_tokens=160)
    assert pages_for_move(moving, num_available=100) == 14  # 64 tokens more
    assert pages_for_move(moving, num_available=12) == 12
    assert pages_for_move(moving, num_available=3) == 11


def test_no_room_is_made_for_more_than_the_request_can_become() -> None:
    assert pages_for_move(request(num_tokens=160, max_tokens=8), num_available=100) == 11


def test_a_request_is_frozen_before_it_outgrows_its_room() -> None:
    moving = request(num_tokens=176)
    assert not must_freeze(moving, Room(num_pages=13, num_known_tokens=160))
    assert must_freeze(moving, Room(num_pages=12, num_known_tokens=160))


def test_a_request_is_frozen_before_its_logprobs_are_more_than_come_along() -> None:
    moving = request(num_tokens=MAX_LOGPROBS, num_logprobs=1)
    assert not must_freeze(moving, Room(num_pages=1000, num_known_tokens=MAX_LOGPROBS - 10))
    assert must_freeze(moving, Room(num_pages=1000, num_known_tokens=10))


def test_logprobs_that_could_not_come_along_are_not_kept() -> None:
    told = request(num_tokens=1)
    for number in range(5 * MAX_LOGPROBS):
        keep_logprobs(told, [TokenLogprobs(float(-number))])
    assert MAX_LOGPROBS <= len(told.output_logprobs) <= 2 * MAX_LOGPROBS
    assert told.output_logprobs[-1] == TokenLogprobs(float(1 - 5 * MAX_LOGPROBS))
