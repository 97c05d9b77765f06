"""What loads work with and within which bounds; and blocks that have come."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvstore.codec.codec import KvCodec
from kvstore.store import BlockStore, PinnedBlocks, Reservation
from kvstore.stream_estimates import LevelEstimates, LinkEstimate
from kvstore.tiers.tier import Tier
from workers.cost_model import CostModel
from workers.engine.kv_memory import KvMemory
from workers.fetch import BlockFetcher
from workers.kv_metrics import KvMetrics
from workers.load_plan import Span
from workers.messages import BlocksPlaced, LoadFailed, PagesFree
from workers.request import PageId
from workers.state import EngineState

MAX_PEERS = 256  # whose speed is remembered
# After a restart the disk is all that holds anything, and nothing was measured: it is tried. One that is slower has
# shown it after a chunk.
PRIOR_DISK_BYTES_S = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadLimits:
    max_level: int  # nothing more lossy is fetched
    ttft_objective_s: float
    max_num_loads: int = 16  # at a time
    chunk_blocks: int = 16
    max_ahead_chunks: int = 16  # of one load, in slots and not in pages
    max_outstanding: int = 3  # chunks asked for and not here: one on the wire, two being decoded
    timeout_s: float = 60.0  # of a whole load, the wait for pages included
    least_patience_s: float = 0.01  # with a chunk that computing overtakes: waking threads takes as long

    def __post_init__(self) -> None:
        for name in (
            "ttft_objective_s",
            "max_num_loads",
            "chunk_blocks",
            "max_ahead_chunks",
            "max_outstanding",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What was learned of where blocks come from; outlives single loads."""

    levels: LevelEstimates
    disk: LinkEstimate = field(default_factory=lambda: LinkEstimate(prior_bytes_s=PRIOR_DISK_BYTES_S))
    peers: dict[str, LinkEstimate] = field(default_factory=dict)  # by control address

    def peer(self, address: str) -> LinkEstimate:
        if len(self.peers) > MAX_PEERS:
            del self.peers[next(iter(self.peers))]
        return self.peers.setdefault(address, LinkEstimate())


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadParts:
    state: EngineState
    kv_pool: KvMemory
    store: BlockStore
    fetcher: BlockFetcher
    codec: KvCodec
    costs: CostModel
    metrics: KvMetrics
    limits: LoadLimits
    post: Callable[
        [BlocksPlaced | LoadFailed | PagesFree], None
    ]  # to the loop, which acts on it between steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrived:
    """Blocks in slots of the memory tier, held until they are closed; or in the request's pages already."""

    span: Span
    held: PinnedBlocks | Reservation
    tier: Tier
    is_exact: bool
    is_in_pages: bool = False


@contextlib.contextmanager
def filling(state: EngineState, page_ids: Sequence[PageId]) -> Iterator[None]:
    """While a thread writes to pages: if their request is aborted meanwhile, nobody else gets them."""
    state.pin_pages(page_ids)
    try:
        yield
    finally:
        state.unpin_pages(page_ids)
