"""What a routing decision is made from, and what it says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from control_plane.directory.member import Incarnation, Role, WorkerId, WorkerLoad


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerView:
    """One worker at this moment: what it reported last, and what was sent to it since.

    `num_assigned` are all requests of this gateway that it works on. `num_unreported_tokens` (to compute) and
    `num_unreported_pages` are for those sent after its last report, which `load` therefore cannot contain.
    `last_pick` orders workers by when they were last chosen; 0: never.
    """

    incarnation: Incarnation
    role: Role
    model_fingerprint: bytes
    load: WorkerLoad
    is_healthy: bool = True
    num_assigned: int = 0
    num_unreported_tokens: int = 0
    num_unreported_pages: int = 0
    last_pick: int = 0


@dataclass(frozen=True, slots=True)
class ClusterView:
    workers: tuple[WorkerView, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingRequest:
    """`num_cached_tokens`: of the prompt, by worker; absent is 0. `model_fingerprint`: None takes any model.

    `can_hand_over` is False for a request that has output already: no worker prefills it for another.
    """

    num_prompt_tokens: int
    num_cached_tokens: Mapping[WorkerId, int] = field(default_factory=dict)
    model_fingerprint: bytes | None = None
    excluded: frozenset[Incarnation] = frozenset()
    can_hand_over: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Who generates and, unless the decode worker computes the prompt itself, who prefills."""

    decode: Incarnation
    prefill: Incarnation | None = None


class NoPlacement(Enum):
    """Why nobody can serve a request: the first filter, in this order, that left no decode worker."""

    NO_DECODE_WORKER = "no worker that decodes is registered"
    OTHER_MODEL = "no worker serves this model"
    UNHEALTHY = "no worker that decodes can be reached"
    ALL_FAILED = "every worker that decodes has failed this request"
    OVERLOADED = "the queue of every worker is full"
