"""Who this worker is: what is known once the model is loaded and the addresses are bound, and then never changes."""

from dataclasses import dataclass

from kvstore.layout import KvLayout
from workers.config import Role


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """`epoch` is new at every start of the process, so that nobody takes this incarnation for the one before."""

    worker_id: str
    epoch: int
    role: Role
    pid: int
    control_address: str
    data_address: str
    model_name: str
    fingerprint: bytes
    max_model_len: int
    vocab_size: int
    layout: KvLayout
    max_num_seqs: int = 0  # of a store, which runs none
