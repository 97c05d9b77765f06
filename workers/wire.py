"""Protobuf messages to our types and back: with `handoff_wire` the only place that knows both.

What a message alone can show to be wrong is refused here.
"""

import math
from collections.abc import Iterable

from kvstore.blocks import FORMAT_VERSION
from protos import worker_pb2
from workers.config import Role
from workers.errors import InvalidRequest, MoveFailed, QueueFull, WorkerDraining, WorkerError
from workers.handoff_wire import FINISH_TO_WIRE, layout_to_wire, logprobs_to_wire, stamps_to_wire
from workers.identity import Identity
from workers.reports import Load
from workers.request import (
    KvHolder,
    KvSource,
    Purpose,
    Request,
    RequestId,
    RequestOutput,
    SamplingParams,
    SessionId,
)

MAX_REQUEST_ID_CHARS = 256
MAX_KV_HOLDERS = 16
MAX_TENANT_CHARS = 256

_ROLES = {
    Role.PREFILL: worker_pb2.ROLE_PREFILL,
    Role.DECODE: worker_pb2.ROLE_DECODE,
    Role.MIXED: worker_pb2.ROLE_MIXED,
    Role.STORE: worker_pb2.ROLE_STORE,
}
_PURPOSES = {
    worker_pb2.Submit.GENERATE: Purpose.GENERATE,
    worker_pb2.Submit.PREFILL_ONLY: Purpose.PREFILL_ONLY,
}
# Whatever is not here is our own failure.
_FAILURE_CODES: dict[type[WorkerError], "worker_pb2.Failure.Code.ValueType"] = {
    InvalidRequest: worker_pb2.Failure.INVALID,
    QueueFull: worker_pb2.Failure.OVERLOADED,
    MoveFailed: worker_pb2.Failure.UNAVAILABLE,
    WorkerDraining: worker_pb2.Failure.UNAVAILABLE,
}


def request_from_wire(message: worker_pb2.Submit, *, session_id: SessionId, now_s: float) -> Request:
    """The request of a `Submit`. `InvalidRequest` names the offending value; `EngineState.add` checks the tokens.

    Arrival is the gateway's, so that requests which waited there are not overtaken, but never in our future.
    """
    if not 0 < len(message.request_id) <= MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(
            f"request_id must have 1 to {MAX_REQUEST_ID_CHARS} characters, got {len(message.request_id)}"
        )
    if message.purpose not in _PURPOSES:
        raise InvalidRequest(f"purpose must be GENERATE (0) or PREFILL_ONLY (1), got {message.purpose}")
    if len(message.tenant) > MAX_TENANT_CHARS:
        raise InvalidRequest(
            f"tenant must have at most {MAX_TENANT_CHARS} characters, got {len(message.tenant)}"
        )
    arrival_s = message.arrival_unix_s
    return Request(
        request_id=RequestId(message.request_id),
        session_id=session_id,
        prompt_token_ids=list(message.prompt_token_ids),
        sampling=_sampling_from_wire(message.sampling),
        arrival_s=min(arrival_s, now_s) if 0.0 < arrival_s < math.inf else now_s,
        priority=message.priority,
        tenant=message.tenant,
        tenant_weight=_weight_from_wire(message),
        deadline_s=message.deadline_unix_s if 0.0 < message.deadline_unix_s < math.inf else None,
        cache_salt=message.cache_salt,
        purpose=_PURPOSES[message.purpose],
        kv_source=_kv_source_from_wire(message) if message.HasField("kv_source") else None,
        kv_holders=_kv_holders_from_wire(message),
        output_token_ids=list(message.output_token_ids),
    )


def _weight_from_wire(message: worker_pb2.Submit) -> float:
    weight = message.tenant_weight or 1.0
    if not 1e-3 <= weight <= 1e3:
        raise InvalidRequest(f"tenant_weight must be between 0.001 and 1000, got {weight:g}")
    return weight


def _sampling_from_wire(message: worker_pb2.SamplingParams) -> SamplingParams:
    try:
        return SamplingParams(
            temperature=message.temperature,
            top_k=message.top_k,
            top_p=message.top_p,
            min_p=message.min_p,
            repetition_penalty=message.repetition_penalty,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            logit_bias=tuple(sorted(message.logit_bias.items())),
            seed=message.seed,
            stop_token_ids=tuple(message.stop_token_ids),
            stop_strings=tuple(message.stop_strings),
            num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
            max_tokens=message.max_tokens,
            min_tokens=message.min_tokens,
            ignore_eos=message.ignore_eos,
        )
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def _kv_source_from_wire(message: worker_pb2.Submit) -> KvSource:
    source = message.kv_source
    if not source.control_address or not source.request_id:
        raise InvalidRequest("kv_source needs control_address and request_id")
    return KvSource(
        worker_id=source.worker_id,
        epoch=source.epoch,
        control_address=source.control_address,
        request_id=source.request_id,
        is_live=source.is_live,
    )


def _kv_holders_from_wire(message: worker_pb2.Submit) -> tuple[KvHolder, ...]:
    """Hints: those that say nothing are passed over, and so are more than anybody could try."""
    return tuple(
        KvHolder(
            worker_id=holder.worker_id,
            epoch=holder.epoch,
            control_address=holder.control_address,
            num_blocks=holder.num_blocks,
        )
        for holder in message.kv_holders[:MAX_KV_HOLDERS]
        if holder.control_address and holder.num_blocks
    )


def description_to_wire(identity: Identity, load: Load, *, is_draining: bool) -> worker_pb2.WorkerDescription:
    return worker_pb2.WorkerDescription(
        worker_id=identity.worker_id,
        epoch=identity.epoch,
        role=_ROLES[identity.role],
        control_address=identity.control_address,
        data_address=identity.data_address,
        model=worker_pb2.ModelDescription(
            name=identity.model_name,
            fingerprint=identity.fingerprint,
            max_model_len=identity.max_model_len,
            vocab_size=identity.vocab_size,
            layout=layout_to_wire(identity.layout),
        ),
        load=worker_pb2.WorkerLoad(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_pages=load.num_pages,
            num_free_pages=load.num_free_pages,
            num_waiting_tokens=load.num_waiting_tokens,
            num_leases=load.num_leases,
            num_demanded_pages=load.num_demanded_pages,
        ),
        pid=identity.pid,
        block_format=FORMAT_VERSION,
        is_draining=is_draining,
        max_num_seqs=identity.max_num_seqs,
    )


def output_to_wire(output: RequestOutput) -> worker_pb2.Output:
    return worker_pb2.Output(
        request_id=output.request_id,
        first_token_number=output.first_token_number,
        token_ids=output.token_ids,
        logprobs=[logprobs_to_wire(logprobs) for logprobs in output.logprobs],
        finish_reason=FINISH_TO_WIRE[output.finish_reason],
        stop_string=output.stop_string or "",
        num_cached_tokens=output.num_cached_tokens,
        failure=None if output.failure is None else _failure_to_wire(output.failure),
        timeline=stamps_to_wire(output.timeline),
    )


def refusal_to_wire(request_id: str, error: WorkerError) -> worker_pb2.Output:
    """The end of a request that never began."""
    return worker_pb2.Output(
        request_id=request_id, finish_reason=worker_pb2.FINISH_ERROR, failure=_failure_to_wire(error)
    )


def _failure_to_wire(error: WorkerError) -> worker_pb2.Failure:
    retry_after_s = error.retry_after_s if isinstance(error, QueueFull) else 0.0
    for kind, code in _FAILURE_CODES.items():
        if isinstance(error, kind):
            return worker_pb2.Failure(code=code, message=str(error), retry_after_s=retry_after_s)
    return worker_pb2.Failure(code=worker_pb2.Failure.INTERNAL, message=str(error))


def step_to_wire(number: int, outputs: Iterable[worker_pb2.Output]) -> worker_pb2.SessionEvent:
    return worker_pb2.SessionEvent(step=worker_pb2.Step(number=number, outputs=outputs))
