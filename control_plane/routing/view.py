"""What a routing decision is made from, and what it says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from control_plane.directory.member import Incarnation, Role, WorkerId, WorkerLoad
from control_plane.directory.overlap import NO_OVERLAP, Overlap
from kvstore.blocks import BLOCK_SIZE_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerView:
    """One worker or store at this moment: what it reported last, and what was sent to it since.

    `num_assigned` are all requests of this gateway that it works on. `num_unreported_tokens` (to compute) and
    `num_unreported_pages` are for those sent after its last report, which `load` therefore cannot contain.
    `max_num_seqs`: so many run at a time, if it is known. `last_pick` orders workers by when they were last chosen;
    0: never.
    """

    incarnation: Incarnation
    role: Role
    model_fingerprint: bytes
    load: WorkerLoad
    is_healthy: bool = True
    is_draining: bool = False
    num_assigned: int = 0
    num_unreported_tokens: int = 0
    num_unreported_pages: int = 0
    max_num_seqs: int | None = None
    last_pick: int = 0


@dataclass(frozen=True, slots=True)
class ClusterView:
    workers: tuple[WorkerView, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingRequest:
    """`overlaps`: what workers and stores hold of the prompt; absent is nothing. `model_fingerprint`: None takes any.

    `can_hand_over` is False for a request that has output already: no worker prefills it for another.
    """

    num_prompt_tokens: int
    overlaps: Mapping[WorkerId, Overlap] = field(default_factory=dict)
    model_fingerprint: bytes | None = None
    excluded: frozenset[Incarnation] = frozenset()
    can_hand_over: bool = True
    max_overlap_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        longest = max((overlap.num_blocks for overlap in self.overlaps.values()), default=0)
        object.__setattr__(self, "max_overlap_blocks", longest)

    def overlap(self, worker_id: WorkerId) -> Overlap:
        return self.overlaps.get(worker_id, NO_OVERLAP)

    def num_cached_tokens(self, worker_id: WorkerId) -> int:
        """Of the prompt, in the worker's own tiers, whichever: it loads them or has them."""
        return min(self.num_prompt_tokens, self.overlap(worker_id).num_blocks * BLOCK_SIZE_TOKENS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """Somebody who holds so many leading blocks of the prompt."""

    holder: Incarnation
    num_blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Who generates and, unless the decode worker computes the prompt itself, who prefills.

    `kv_holders`: where whoever computes the prompt can fetch what it lacks, best first. `num_uncached_tokens`: of
    the prompt, that are in none of its own tiers.
    """

    decode: Incarnation
    prefill: Incarnation | None = None
    kv_holders: tuple[Holding, ...] = ()
    num_uncached_tokens: int


class NoPlacement(Enum):
    """Why nobody can serve a request: the first filter, in this order, that left no decode worker."""

    NO_DECODE_WORKER = "no worker that decodes is registered"
    OTHER_MODEL = "no worker serves this model"
    UNHEALTHY = "no worker that decodes can be reached"
    DRAINING = "every worker that decodes is draining and takes no new requests"
    ALL_FAILED = "every worker that decodes has failed this request"
    OVERLOADED = "the queue of every worker is full"
