"""What a storm does and in which order, by its seed alone; and how a disturbed answer differs from the undisturbed one.

A storm has lanes that blow at the same time. Each does one thing after the other and waits in between until all is
well again, so that of the workers that may generate only one is away at a time: with both away requests can but wait,
and one that loses two workers at the same token is refused as poison, which is no failure of ours.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

LONGEST_PAUSE_S = 2.0
LONGEST_STOP_S = 4.0  # twice the silence after which a worker is dropped


class Kind(Enum):
    KILL_WORKER = "worker killed"
    STOP_WORKER = "worker stopped"  # and continued
    SLOW_WORKER = "worker slowed"  # stopped and continued, ten times a second
    CUT_WORKER = "worker cut off"  # all its connections end, new ones at once
    DRAIN_WORKER = "worker drained"  # and restarted
    MOVE_REQUEST = "request moved"
    KILL_GATEWAY = "gateway killed"
    STOP_GATEWAY = "gateway stopped"
    KILL_REDIS = "Redis killed"
    STOP_REDIS = "Redis stopped"
    FILL_DISK = "disk filled"


WORKER_KINDS = (Kind.KILL_WORKER, Kind.DRAIN_WORKER, Kind.STOP_WORKER, Kind.SLOW_WORKER, Kind.CUT_WORKER)
GATEWAY_KINDS = (Kind.KILL_GATEWAY, Kind.STOP_GATEWAY)
REDIS_KINDS = (Kind.KILL_REDIS, Kind.STOP_REDIS)


@dataclass(frozen=True, slots=True)
class Lane:
    """Things of `kinds` happen to `targets`, one at a time."""

    name: str
    kinds: Sequence[Kind]
    targets: Sequence[str]
    longest_pause_s: float = LONGEST_PAUSE_S


@dataclass(frozen=True, slots=True)
class Disturbance:
    kind: Kind
    target: str
    pause_s: float  # before it
    lasts_s: float  # if it lasts
    choice: float  # in [0, 1), of the request among those that run


def disturbances(lane: Lane, *, seed: int) -> Iterator[Disturbance]:
    """Without end. Every kind comes up once before any does again, so that a short storm has them all."""
    generator = random.Random(f"{seed} {lane.name}")
    while True:
        for kind in generator.sample(lane.kinds, len(lane.kinds)):
            yield Disturbance(
                kind=kind,
                target=generator.choice(lane.targets),
                pause_s=generator.uniform(0.1, 1.0) * lane.longest_pause_s,
                lasts_s=generator.uniform(0.1, 1.0) * LONGEST_STOP_S,
                choice=generator.random(),
            )


@dataclass(frozen=True, slots=True)
class Difference:
    """Tokens of an answer against those of the same answer undisturbed."""

    num_lost: int = 0
    num_duplicated: int = 0
    num_wrong: int = 0


def num_equal(found: Sequence[str], expected: Sequence[str]) -> int:
    """How many are the same before the first that is not."""
    pairs = enumerate(zip(found, expected, strict=False))
    return next((number for number, (one, other) in pairs if one != other), min(len(found), len(expected)))


def difference(found: Sequence[str], expected: Sequence[str]) -> Difference:
    """A run that is missing or comes again counts as that if the rest is right, else all that differs is wrong."""
    same = num_equal(found, expected)
    excess = len(found) - len(expected)
    if excess <= 0 and list(found[same:]) == list(expected[same - excess :]):
        return Difference(num_lost=-excess)
    if excess > 0 and list(found[same + excess :]) == list(expected[same:]):
        return Difference(num_duplicated=excess)
    rest = zip(found[same:], expected[same:], strict=False)
    return Difference(
        num_lost=max(-excess, 0),
        num_duplicated=max(excess, 0),
        num_wrong=sum(one != other for one, other in rest),
    )
