"""Clients of a storm: each has a request under way all the time and knows what its answer must be."""

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.chaos_storm import Difference, difference, num_equal
from bench.load import StreamTiming, random_prompt, stream_completion

MODEL = "penstock-demo"
VOCAB_SIZE = 1900  # of the demo model's 2560; the last ones are special
NUM_CLIENTS = 6
REQUEST_TIMEOUT_S = 60.0
PROMPT_TOKENS = (20, 100, 400, 900)
OUTPUT_TOKENS = (40, 150, 400)
SAMPLINGS: Sequence[dict[str, Any]] = (
    {"temperature": 0},
    {"temperature": 0.9, "seed": 7},
    {"temperature": 0.7, "seed": 8, "presence_penalty": 0.5, "frequency_penalty": 0.3, "top_p": 0.9},
)


@dataclass(slots=True)
class GatewayDoor:
    """`num_kills` grows before each kill: who had a request there then has lost it by right."""

    port: int
    is_open: bool = True
    num_kills: int = 0


@dataclass(frozen=True, slots=True)
class Known:
    """A request and its undisturbed answer."""

    body: dict[str, Any]
    tokens: Sequence[str]
    logprobs: Sequence[float]
    text: str


@dataclass(slots=True)
class Account:
    num_requests: int = 0
    num_with_gateway: int = 0  # that ended with their gateway, and were sent again
    num_tokens: int = 0
    num_lost: int = 0
    num_duplicated: int = 0
    num_wrong: int = 0
    failures: list[str] = field(default_factory=list)  # that clients saw
    mismatches: list[str] = field(default_factory=list)  # answers that are not what they must be

    def compare(self, name: str, timing: StreamTiming, known: Known) -> None:
        """What has come of an answer, up to its end or to where it broke off."""
        is_whole = timing.error is None
        expected = known.tokens if is_whole else known.tokens[: len(timing.tokens)]
        found = difference(timing.tokens, expected)
        self.num_lost += found.num_lost
        self.num_duplicated += found.num_duplicated
        self.num_wrong += found.num_wrong
        if found != Difference():
            self.mismatches.append(f"{name}: {found}, {_where(timing, known)}")
        elif is_whole and timing.text != known.text:
            self.num_wrong += 1
            self.mismatches.append(f"{name}: the right tokens, but another text")


def _where(timing: StreamTiming, known: Known) -> str:
    """Logprobs that were off before the first wrong token speak for wrong KV, and equal ones for a near tie."""
    same = num_equal(timing.tokens, known.tokens)
    pairs = zip(timing.logprobs[:same], known.logprobs[:same], strict=True)
    off = max((abs(one - other) for one, other in pairs), default=0.0)
    sampling = {name: value for name, value in known.body.items() if name not in ("prompt", "model")}
    return (
        f"from token {same} of {len(known.tokens)} on, prompt of {len(known.body['prompt'])}; "
        f"logprobs before it off by at most {off:.1e}; {sampling}"
    )


def request_bodies(seed: int) -> list[dict[str, Any]]:
    """One of every length of prompt, of output and way of sampling, in an order of the seed."""
    choices = list(itertools.product(PROMPT_TOKENS, OUTPUT_TOKENS, SAMPLINGS))
    random.Random(seed).shuffle(choices)
    return [
        {
            "model": MODEL,
            "prompt": random_prompt(seed=seed + number, num_tokens=prompt_tokens, vocab_size=VOCAB_SIZE),
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "logprobs": 0,  # the chosen token's, which brings the tokens one by one
            **sampling,
        }
        for number, (prompt_tokens, output_tokens, sampling) in enumerate(choices)
    ]


class Clients:
    def __init__(self, doors: Sequence[GatewayDoor], *, seed: int) -> None:
        self.account = Account()
        self._doors = doors
        self._seed = seed
        self._numbers = itertools.count()
        self._known: list[Known] = []

    async def learn(self) -> None:
        """What is answered while nothing is disturbed. Raises RuntimeError if that fails."""
        bodies = iter(request_bodies(self._seed))

        async def ask() -> list[Known]:
            answers = [(body, await self._stream(self._doors[0], body, name="learn")) for body in bodies]
            for _, timing in answers:
                if timing.error is not None:
                    raise RuntimeError(f"a request failed before the storm: {timing.error}")
            return [Known(body, timing.tokens, timing.logprobs, timing.text) for body, timing in answers]

        for known in await asyncio.gather(*(ask() for _ in range(NUM_CLIENTS))):
            self._known += known
        # The order in which they were answered varies; what the seed says must not.
        self._known.sort(key=lambda known: list(known.body["prompt"]))

    async def run(self, stop: asyncio.Event) -> None:
        """Every client finishes its request once `stop` is set."""
        await asyncio.gather(*(self._client(stop) for _ in range(NUM_CLIENTS)))

    async def _client(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            number = next(self._numbers)
            known = self._known[number % len(self._known)]
            # Every second time nobody holds the prompt's blocks, and it must be computed.
            salt = f"storm-{number}" if number // len(self._known) % 2 == 0 else ""
            await self._ask(number, {**known.body, "cache_salt": salt}, known)

    async def _ask(self, number: int, body: dict[str, Any], known: Known) -> None:
        """Until it is answered, or fails beside a gateway that lives."""
        self.account.num_requests += 1
        for attempt in itertools.count():
            door = await self._open_door(number + attempt)
            num_kills = door.num_kills
            timing = await self._stream(door, body, name=f"storm-{number}.{attempt}")
            if timing.error is None or door.num_kills == num_kills:
                break
            # What had come must have been right all the same.
            self.account.compare(f"storm-{number}.{attempt}", timing, known)
            self.account.num_with_gateway += 1
        self.account.num_tokens += len(timing.tokens)
        self.account.compare(f"storm-{number}.{attempt}", timing, known)
        if timing.error is not None:
            self.account.failures.append(f"storm-{number} after {len(timing.tokens)} tokens: {timing.error}")

    async def _open_door(self, turn: int) -> GatewayDoor:
        while True:
            open_doors = [door for door in self._doors if door.is_open]
            if open_doors:
                return open_doors[turn % len(open_doors)]
            await asyncio.sleep(0.05)

    async def _stream(self, door: GatewayDoor, body: dict[str, Any], *, name: str) -> StreamTiming:
        timing = StreamTiming(started_s=time.perf_counter())
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await stream_completion(
                    host="127.0.0.1",
                    port=door.port,
                    body=body,
                    headers={"X-Request-Id": name},
                    timing=timing,
                )
        except TimeoutError:
            timing.error = f"not answered within {REQUEST_TIMEOUT_S:g} s"
        return timing
