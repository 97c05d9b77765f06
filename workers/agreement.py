"""What a peer must mean and share with this worker before KV may move between them."""

from dataclasses import dataclass
from typing import Literal

from kvstore.blocks import FORMAT_VERSION
from kvstore.layout import KvLayout
from protos import worker_pb2
from workers.handoff_wire import layout_to_wire

# "epoch" is another incarnation and no news; the others mean that KV could not be used which should have been.
Differs = Literal["epoch", "fingerprint", "layout", "block_format"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceIdentity:
    """This incarnation, as peers must name it."""

    epoch: int
    model_fingerprint: bytes
    layout: KvLayout
    data_address: str  # as peers reach it


@dataclass(frozen=True, slots=True)
class Disagreement:
    what: Differs
    text: str  # names both values


def check_epoch(ours: SourceIdentity, epoch: int) -> Disagreement | None:
    if epoch == ours.epoch:
        return None
    return Disagreement("epoch", f"the message is for epoch {epoch}, this worker is epoch {ours.epoch}")


def check_model(
    ours: SourceIdentity, *, fingerprint: bytes, layout: worker_pb2.KvLayout
) -> Disagreement | None:
    if fingerprint != ours.model_fingerprint:
        return Disagreement(
            "fingerprint",
            f"the peer's model is {fingerprint.hex()}, this worker serves {ours.model_fingerprint.hex()}",
        )
    if layout != (our_layout := layout_to_wire(ours.layout)):
        return Disagreement(
            "layout", f"the peer's KV layout is {_line(layout)}, this worker's {_line(our_layout)}"
        )
    return None


def check_block_format(block_format: bytes) -> Disagreement | None:
    if block_format == FORMAT_VERSION:
        return None
    return Disagreement(
        "block_format",
        f"the peer's blocks are named by {block_format!r}, this worker's by {FORMAT_VERSION!r}",
    )


def _line(layout: worker_pb2.KvLayout) -> str:
    return (
        f"{layout.num_layers} layers of {layout.num_kv_heads} heads of {layout.head_dim}, "
        f"{layout.dtype}, {layout.block_size_tokens} tokens a block"
    )
