"""A request moves from one worker to another while it runs, and nobody could tell from its tokens."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from protos import worker_pb2
from workers import moves
from workers.config import Role
from workers.errors import PullCorrupted
from workers.live_moves import LiveMoves
from workers.state import EngineState

Fixture = Any
PROMPT = [(7 * i) % 250 + 3 for i in range(70)]
NUM_TOKENS = 400
SOON_S = 20.0

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7, "top_k": 40},
    "penalized": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "logprobs": {"temperature": 0.7, "seed": 3, "num_logprobs": 2},
}


class Pair:
    """Two workers, a session with each, and a request on the first."""

    def __init__(self, workers: tuple[Any, Any], sessions: tuple[Any, Any]) -> None:
        self.source, self.target = workers
        self.at_source, self.at_target = sessions
        self.fields: dict[str, Any] = {}

    async def begin(self, prompt: list[int] = PROMPT, **fields: Any) -> Any:
        self.fields = {"max_tokens": NUM_TOKENS, "ignore_eos": True} | fields
        return await self.at_source.submit("r", prompt, **self.fields)

    async def move(self, answer: Any, prompt: list[int] = PROMPT) -> Any:
        """What the gateway does: submits the request to the target, with the tokens that it has heard."""
        return await self.at_target.submit(
            "r", prompt, kv_source=self.source.identity, is_live=True,
            output_token_ids=list(answer.token_ids), **self.fields,
        )  # fmt: skip

    async def settled(self) -> None:
        await self.source.settled()
        await self.target.settled()
        for worker in (self.source, self.target):
            assert worker.worker.state.moving() == ()


StartPair = Callable[..., Awaitable[Pair]]


@pytest.fixture
async def start_pair(start_worker: Fixture, open_session: Fixture) -> StartPair:
    async def start(*, source: dict[str, Any] | None = None, target: dict[str, Any] | None = None) -> Pair:
        workers = (
            await start_worker(Role.MIXED, **(source or {})),
            await start_worker(Role.MIXED, **(target or {})),
        )
        return Pair(workers, (await open_session(workers[0]), await open_session(workers[1])))

    return start


def joined(source: Any, target: Any) -> list[int]:
    """The source's tokens up to the target's first, then the target's; where both said a token, it is the same."""
    start = target.first_token_number
    overlap = source.token_ids[start:]
    assert target.token_ids[: len(overlap)] == overlap
    return list(source.token_ids[:start] + target.token_ids)


async def reached(answer: Any, num_tokens: int) -> None:
    async with asyncio.timeout(SOON_S):
        while len(answer.token_ids) < num_tokens:  # noqa: ASYNC110
            await asyncio.sleep(0)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
async def test_a_request_that_moves_in_mid_stream_says_what_it_would_have_said(
    start_pair: StartPair, sampling: dict[str, Any]
) -> None:
    pair = await start_pair()
    undisturbed = await (await pair.begin(**sampling)).wait()
    await pair.source.settled()
    at_source = await pair.begin(**sampling)
    await reached(at_source, 20)
    at_target = await (await pair.move(at_source)).wait()
    await at_source.wait()
    assert (at_source.finish_reason, at_target.finish_reason) == ("handed_over", "length")
    assert len(at_source.token_ids) < NUM_TOKENS
    assert joined(at_source, at_target) == undisturbed.token_ids
    if "num_logprobs" in sampling:
        start = at_target.first_token_number
        expected = [logprobs.logprob for logprobs in undisturbed.logprobs[start:]]
        assert [logprobs.logprob for logprobs in at_target.logprobs] == pytest.approx(expected, abs=1e-4)
    await pair.settled()


async def test_a_stop_string_is_found_at_the_target_as_it_would_have_been_at_the_source(
    start_pair: StartPair, checkpoint: Path
) -> None:
    pair = await start_pair()
    free = await (await pair.begin(temperature=1.0, seed=5)).wait()
    await pair.source.settled()
    stop = _late_text(Tokenizer.from_file(str(checkpoint / "tokenizer.json")), free.token_ids)
    undisturbed = await (await pair.begin(temperature=1.0, seed=5, stop_strings=[stop])).wait()
    await pair.source.settled()
    assert undisturbed.finish_reason == "stop"
    at_source = await pair.begin(temperature=1.0, seed=5, stop_strings=[stop])
    await reached(at_source, 10)
    at_target = await (await pair.move(at_source)).wait()
    assert joined(at_source, at_target) == undisturbed.token_ids
    assert (at_target.finish_reason, at_target.last.stop_string) == ("stop", stop)
    await pair.settled()


def _late_text(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """Of two neighbouring tokens in the second half, and not to be found before."""
    for position in range(len(token_ids) // 2, len(token_ids) - 1):
        text: str = tokenizer.decode(token_ids[position : position + 2])
        if (
            len(text) == 2
            and text.isascii()
            and text.isprintable()
            and text not in tokenizer.decode(token_ids[:position])
        ):
            return text
    raise AssertionError("no two tokens are printable")


async def test_a_long_prompt_moves_while_it_is_being_computed(start_pair: StartPair) -> None:
    prompt = [(11 * i) % 250 + 3 for i in range(450)]
    pair = await start_pair(source={"max_num_batched_tokens": 16, "max_num_seqs": 4})
    undisturbed = await (await pair.at_target.submit("u", prompt, max_tokens=20, ignore_eos=True)).wait()
    await pair.target.settled()
    at_source = await pair.begin(prompt, max_tokens=20)
    at_target = await (await pair.move(at_source, prompt)).wait()
    await at_source.wait()
    assert joined(at_source, at_target) == undisturbed.token_ids
    await pair.settled()


async def test_a_waiting_request_moves_as_its_tokens(start_pair: StartPair) -> None:
    # One runs at a time, and those before it for much longer than it takes to move.
    pair = await start_pair(source={"max_num_seqs": 1})
    hogs = [
        await pair.at_source.submit(f"hog-{number}", [9] * 60, max_tokens=430, ignore_eos=True)
        for number in range(6)
    ]
    async with asyncio.timeout(SOON_S):
        await hogs[0].began.wait()
    waiting = await pair.begin(max_tokens=30)
    at_target = await (await pair.move(waiting)).wait()
    await waiting.wait()
    assert (waiting.token_ids, waiting.finish_reason) == ([], "handed_over")
    assert at_target.first_token_number == 0
    assert len(at_target.token_ids) == 30
    for hog in hogs:
        await hog.wait()
    await pair.settled()


async def test_one_that_is_aborted_at_the_target_goes_on_at_the_source(
    start_pair: StartPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = await start_pair()
    undisturbed = await (await pair.begin()).wait()
    await pair.source.settled()
    monkeypatch.setattr(LiveMoves, "freeze", lambda self, request_id: False)  # it never gets as far as that
    monkeypatch.setattr(LiveMoves, "step_ended", lambda self: ())
    at_source = await pair.begin()
    await reached(at_source, 10)
    at_target = await pair.move(at_source)
    async with asyncio.timeout(SOON_S):
        while not pair.source.worker.state.moving():  # noqa: ASYNC110
            await asyncio.sleep(0)
    await pair.at_target.abort("r")
    await at_source.wait()
    await at_target.wait()
    assert (at_source.finish_reason, at_target.finish_reason) == ("length", "abort")
    assert at_source.token_ids == undisturbed.token_ids
    await pair.settled()


async def test_one_that_is_frozen_goes_on_when_its_puller_does_not_say_that_it_has_it(
    start_pair: StartPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = await start_pair()
    undisturbed = await (await pair.begin()).wait()
    await pair.source.settled()
    monkeypatch.setattr(pair.target.worker.puller, "_release_soon", lambda source: None)
    at_source = await pair.begin()
    await reached(at_source, 10)
    at_target = await (await pair.move(at_source)).wait()
    await at_source.wait()
    # Both went on, to the same end: the gateway takes each token once.
    assert at_source.token_ids == undisturbed.token_ids
    assert joined(at_source, at_target) == undisturbed.token_ids
    names = [event.name for event in at_source.last.timeline]
    assert "frozen" in names
    assert "resumed" in names
    await pair.settled()


async def test_one_that_ends_before_it_has_moved_ends_at_the_target_as_unavailable(
    start_pair: StartPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = await start_pair()
    monkeypatch.setattr(LiveMoves, "freeze", lambda self, request_id: False)
    monkeypatch.setattr(LiveMoves, "step_ended", lambda self: ())
    at_source = await pair.begin()
    await reached(at_source, 5)
    at_target = await (await pair.move(at_source)).wait()
    await at_source.wait()
    assert (at_source.finish_reason, at_target.finish_reason) == ("length", "error")
    assert at_target.last.failure.code == worker_pb2.Failure.UNAVAILABLE
    await pair.settled()


async def test_one_whose_target_does_not_believe_what_it_got_goes_on_at_the_source(
    start_pair: StartPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = await start_pair()
    undisturbed = await (await pair.begin()).wait()

    def disbelieve(*arguments: object, **fields: object) -> None:
        raise PullCorrupted("a lie")

    monkeypatch.setattr(moves, "moved_tokens", disbelieve)
    at_source = await pair.begin()
    await reached(at_source, 5)
    at_target = await (await pair.move(at_source)).wait()
    assert at_target.last.failure.code == worker_pb2.Failure.UNAVAILABLE
    assert at_target.last.failure.message.endswith("goes on there: a lie")
    assert (await at_source.wait()).token_ids == undisturbed.token_ids
    assert at_source.finish_reason == "length"  # nobody has told it that the request is elsewhere
    await pair.settled()


async def test_what_cannot_move_is_refused_as_unavailable(start_pair: StartPair) -> None:
    pair = await start_pair()
    answer = await pair.at_target.submit("unknown", PROMPT, kv_source=pair.source.identity, is_live=True)
    await answer.wait()
    assert answer.last.failure.code == worker_pb2.Failure.UNAVAILABLE
    assert "answers NOT_FOUND: request 'unknown' cannot move" in answer.last.failure.message
    await pair.settled()


async def test_only_so_many_move_at_a_time(start_pair: StartPair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = await start_pair()
    monkeypatch.setattr(LiveMoves, "freeze", lambda self, request_id: False)
    monkeypatch.setattr(LiveMoves, "step_ended", lambda self: ())
    first = await pair.begin()
    second = await pair.at_source.submit("second", PROMPT[:30], max_tokens=NUM_TOKENS, ignore_eos=True)
    await reached(first, 5)
    moving = await pair.move(first)
    async with asyncio.timeout(SOON_S):
        while not pair.source.worker.state.moving():  # noqa: ASYNC110
            await asyncio.sleep(0)
    refused = await pair.at_target.submit(
        "second", PROMPT[:30], kv_source=pair.source.identity, is_live=True, max_tokens=NUM_TOKENS
    )
    await refused.wait()
    assert refused.last.failure.code == worker_pb2.Failure.UNAVAILABLE
    assert "1 requests move from here, the most at a time" in refused.last.failure.message
    for answer in (first, second, moving):
        await answer.wait()
    await pair.settled()


async def test_a_client_that_leaves_while_its_request_moves_leaves_nothing(
    start_pair: StartPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = await start_pair()
    freeze = EngineState.freeze
    frozen = asyncio.Event()

    def tells(self: EngineState, *arguments: Any, **fields: Any) -> bool:
        frozen.set()
        return freeze(self, *arguments, **fields)

    monkeypatch.setattr(EngineState, "freeze", tells)
    at_source = await pair.begin()
    await reached(at_source, 5)
    await pair.move(at_source)
    async with asyncio.timeout(SOON_S):
        await frozen.wait()
    await pair.at_source.abort("r")
    await pair.at_target.abort("r")
    await pair.settled()
