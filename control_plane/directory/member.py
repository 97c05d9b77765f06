"""What a worker says about itself, free of protobuf."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, NewType

from kvstore.blocks import FORMAT_VERSION
from kvstore.layout import KvLayout

WorkerId = NewType("WorkerId", str)


class Incarnation(NamedTuple):
    """One life of a worker: every start of its process has a new epoch."""

    worker_id: WorkerId
    epoch: int

    def __str__(self) -> str:
        return f"{self.worker_id} (epoch {self.epoch})"


class Role(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"
    STORE = "store"  # keeps KV for others and computes nothing

    @property
    def can_decode(self) -> bool:
        return self in (Role.DECODE, Role.MIXED)

    @property
    def can_prefill(self) -> bool:
        """Whether it computes prompts for others. A decode worker computes only those of its own requests."""
        return self in (Role.PREFILL, Role.MIXED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    name: str
    fingerprint: bytes
    max_model_len: int
    vocab_size: int
    layout: KvLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLoad:
    """Fields as in worker.proto."""

    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_free_pages: int = 0
    num_waiting_tokens: int = 0
    num_leases: int = 0
    num_demanded_pages: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    worker_id: WorkerId
    epoch: int
    role: Role
    control_address: str
    data_address: str
    model: Model
    load: WorkerLoad = WorkerLoad()
    pid: int = 0
    block_format: bytes = FORMAT_VERSION
    is_draining: bool = False  # it takes no new requests, and what runs there should move
    max_num_seqs: int | None = None  # requests running at a time, if it says so

    def __post_init__(self) -> None:
        if not self.worker_id:
            raise ValueError("worker_id must not be empty")
        if self.epoch <= 0:
            raise ValueError(f"epoch of {self.worker_id} must be positive, got {self.epoch}")
        if not self.control_address:
            raise ValueError(f"control_address of {self.worker_id} must not be empty")

    @property
    def incarnation(self) -> Incarnation:
        return Incarnation(self.worker_id, self.epoch)

    @property
    def has_our_blocks(self) -> bool:
        """Whether it names blocks as we do; else no key of its could ever match."""
        return self.block_format == FORMAT_VERSION
