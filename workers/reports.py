"""What `EngineState` tells others: how busy it is, what changed in its cached blocks, how far exported requests are."""

from dataclasses import dataclass

from kvstore.blocks import BlockKey
from workers.request import Handoff, PageId, RequestId


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockEvents:
    stored: tuple[BlockKey, ...]
    removed: tuple[BlockKey, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """As WorkerLoad in worker.proto."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_waiting_tokens: int
    num_leases: int
    num_demanded_pages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportProgress:
    """How far a request has come that another worker pulls: it may read blocks below `num_computed_tokens`.

    `handoff` is None until the prompt is computed and the first token sampled, or the request moves and is frozen.
    """

    request_id: RequestId
    page_ids: tuple[PageId, ...]
    num_computed_tokens: int
    handoff: Handoff | None
