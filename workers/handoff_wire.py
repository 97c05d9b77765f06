"""What a hand-over says in protobuf: the request's state, and the layout both ends must share."""

import math
from collections.abc import Iterable

from google.protobuf.message import DecodeError

from kvstore.layout import KvLayout
from protos import kv_pb2, worker_pb2
from workers.errors import PullCorrupted
from workers.request import FinishReason, Handoff, TokenLogprobs
from workers.timeline import Stamp

FINISH_TO_WIRE = {
    None: worker_pb2.FINISH_NONE,
    FinishReason.STOP: worker_pb2.FINISH_STOP,
    FinishReason.LENGTH: worker_pb2.FINISH_LENGTH,
    FinishReason.ABORT: worker_pb2.FINISH_ABORT,
    FinishReason.ERROR: worker_pb2.FINISH_ERROR,
    FinishReason.HANDED_OVER: worker_pb2.FINISH_HANDED_OVER,
}
_FINISH_FROM_WIRE = {number: reason for reason, number in FINISH_TO_WIRE.items()}
# A timeline that is longer is cut: stamps are for people and histograms. Sources that send more mean harm.
MAX_STAMPS = 512
MAX_STAMP_NAME = 64  # characters


def encode_handoff(handoff: Handoff) -> bytes:
    """A serialized `HandoffState`."""
    state = kv_pb2.HandoffState(
        num_computed_tokens=handoff.num_computed_tokens,
        output_token_ids=handoff.output_token_ids,
        logprobs=[logprobs_to_wire(logprobs) for logprobs in handoff.logprobs],
        finish_reason=FINISH_TO_WIRE[handoff.finish_reason],
        stop_string=handoff.stop_string or "",
        num_cached_tokens=handoff.num_cached_tokens,
        num_exact_tokens=handoff.num_exact_tokens,
        timeline=stamps_to_wire(handoff.timeline[:MAX_STAMPS]),
    )
    return state.SerializeToString()


def decode_handoff(data: bytes) -> Handoff:
    """Raises PullCorrupted for what no source of this version would send."""
    state = kv_pb2.HandoffState()
    try:
        state.ParseFromString(data)
    except DecodeError as error:
        raise PullCorrupted(f"the state frame holds no HandoffState: {error}") from error
    if state.finish_reason not in _FINISH_FROM_WIRE:
        raise PullCorrupted(f"unknown finish reason {state.finish_reason}")
    if len(state.logprobs) > len(state.output_token_ids):
        raise PullCorrupted(f"{len(state.logprobs)} logprobs for {len(state.output_token_ids)} tokens")
    if state.HasField("num_exact_tokens") and state.num_exact_tokens > state.num_computed_tokens:
        raise PullCorrupted(f"{state.num_exact_tokens} of {state.num_computed_tokens} tokens are exact")
    if len(state.timeline) > MAX_STAMPS:
        raise PullCorrupted(f"a timeline of {len(state.timeline)} events, at most {MAX_STAMPS} are sent")
    for event in state.timeline:
        if len(event.name) > MAX_STAMP_NAME:
            raise PullCorrupted(
                f"an event of {len(event.name)} characters, at most {MAX_STAMP_NAME} are a name"
            )
        if not math.isfinite(event.unix_s):
            raise PullCorrupted(f"{event.name!r} happened at {event.unix_s}")
    return Handoff(
        num_computed_tokens=state.num_computed_tokens,
        output_token_ids=tuple(state.output_token_ids),
        logprobs=tuple(_logprobs_from_wire(logprobs) for logprobs in state.logprobs),
        finish_reason=_FINISH_FROM_WIRE[state.finish_reason],
        stop_string=state.stop_string or None,
        num_cached_tokens=state.num_cached_tokens,
        num_exact_tokens=state.num_exact_tokens if state.HasField("num_exact_tokens") else None,
        timeline=tuple(Stamp(event.name, event.unix_s) for event in state.timeline),
    )


def layout_to_wire(layout: KvLayout) -> worker_pb2.KvLayout:
    return worker_pb2.KvLayout(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_size_tokens=layout.block_size_tokens,
        dtype=layout.dtype,
    )


def stamps_to_wire(stamps: Iterable[Stamp]) -> list[worker_pb2.TimelineEvent]:
    return [worker_pb2.TimelineEvent(name=stamp.name, unix_s=stamp.unix_s) for stamp in stamps]


def logprobs_to_wire(logprobs: TokenLogprobs) -> worker_pb2.TokenLogprobs:
    return worker_pb2.TokenLogprobs(
        logprob=logprobs.logprob,
        top_token_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )


def _logprobs_from_wire(logprobs: worker_pb2.TokenLogprobs) -> TokenLogprobs:
    if len(logprobs.top_token_ids) != len(logprobs.top_logprobs):
        raise PullCorrupted(
            f"{len(logprobs.top_token_ids)} top tokens with {len(logprobs.top_logprobs)} logprobs"
        )
    if any(map(math.isnan, (logprobs.logprob, *logprobs.top_logprobs))):
        raise PullCorrupted("a logprob that is NaN")
    return TokenLogprobs(
        logprob=logprobs.logprob,
        top=tuple(zip(logprobs.top_token_ids, logprobs.top_logprobs, strict=True)),
    )
