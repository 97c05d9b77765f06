"""Protobuf messages of a worker's session to our types and back; nothing else in the gateway knows both."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

from control_plane.directory.member import Incarnation, Member
from control_plane.generation import FinishReason, Generation, SamplingOptions, TokenLogprobs, WorkerEvent
from protos import worker_pb2


class Outcome(Enum):
    """How a worker ended a request."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    FAILED = "failed"
    HANDED_OVER = "handed_over"


class FailureCode(Enum):
    INVALID = "invalid"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"  # it stops, or has given the request up: no fault of either
    INTERNAL = "internal"
    LOST = "lost"  # no worker says this: it died, fell silent or was cut off


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    code: FailureCode
    message: str
    retry_after_s: float = 0.0


@dataclass(kw_only=True, slots=True)
class WorkerOutput:
    """What one engine step has to say about one request. Not frozen: one is made per token and read once."""

    first_token_number: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    outcome: Outcome | None = None
    stop_string: str | None = None
    num_cached_tokens: int = 0
    failure: WorkerFailure | None = None
    events: tuple[WorkerEvent, ...] = ()


FINISH_REASONS = {Outcome.STOP: FinishReason.STOP, Outcome.LENGTH: FinishReason.LENGTH}

_OUTCOMES: dict[int, Outcome] = {
    worker_pb2.FINISH_STOP: Outcome.STOP,
    worker_pb2.FINISH_LENGTH: Outcome.LENGTH,
    worker_pb2.FINISH_ABORT: Outcome.ABORTED,
    worker_pb2.FINISH_ERROR: Outcome.FAILED,
    worker_pb2.FINISH_HANDED_OVER: Outcome.HANDED_OVER,
}
_FAILURE_CODES: dict[int, FailureCode] = {
    worker_pb2.Failure.INVALID: FailureCode.INVALID,
    worker_pb2.Failure.OVERLOADED: FailureCode.OVERLOADED,
    worker_pb2.Failure.UNAVAILABLE: FailureCode.UNAVAILABLE,
}


def read_output(message: worker_pb2.Output) -> WorkerOutput:
    """Any bytes that parse make an output; whether its numbers fit is judged where the sequence is known."""
    logprobs = message.logprobs
    output = WorkerOutput(
        first_token_number=message.first_token_number,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(map(_read_logprobs, logprobs)) if logprobs else (),
        num_cached_tokens=message.num_cached_tokens,
    )
    if message.timeline:
        output.events = _read_events(message.timeline)
    finish_reason = message.finish_reason
    if finish_reason:
        # A reason from a newer worker that means nothing here ends the request as a failure, not as a hang.
        output.outcome = _OUTCOMES.get(finish_reason, Outcome.FAILED)
        output.stop_string = message.stop_string or None
        if output.outcome is Outcome.FAILED:
            output.failure = _read_failure(message.failure)
    return output


def _read_events(messages: Iterable[worker_pb2.TimelineEvent]) -> tuple[WorkerEvent, ...]:
    # A time that is no number would spoil a histogram and is not JSON.
    return tuple(WorkerEvent(each.name, each.unix_s) for each in messages if math.isfinite(each.unix_s))


def _read_logprobs(message: worker_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        message.logprob, tuple(zip(message.top_token_ids, message.top_logprobs, strict=False))
    )


def _read_failure(message: worker_pb2.Failure) -> WorkerFailure:
    code = _FAILURE_CODES.get(message.code, FailureCode.INTERNAL)
    return WorkerFailure(code, message.message or "the worker gave no reason", message.retry_after_s)


def write_hello(member: Member, *, gateway_id: str) -> worker_pb2.SessionRequest:
    return worker_pb2.SessionRequest(
        hello=worker_pb2.Hello(
            gateway_id=gateway_id, worker_epoch=member.epoch, model_fingerprint=member.model.fingerprint
        )
    )


def write_abort(request_id: str) -> worker_pb2.SessionRequest:
    return worker_pb2.SessionRequest(abort=worker_pb2.Abort(request_id=request_id))


@dataclass(frozen=True, kw_only=True, slots=True)
class KvHolder:
    member: Member
    num_blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """One attempt at a generation. `output_token_ids` exist already.

    `kv_holders` are for the worker that computes the prompt: the others get it from that one.
    """

    request_id: str
    generation: Generation
    output_token_ids: tuple[int, ...] = ()
    arrival_unix_s: float
    kv_holders: tuple[KvHolder, ...] = ()

    def without_holder(self, incarnation: Incarnation) -> "Assignment":
        kept = tuple(holder for holder in self.kv_holders if holder.member.incarnation != incarnation)
        return replace(self, kv_holders=kept)


def write_prefill(assignment: Assignment) -> worker_pb2.SessionRequest:
    submit = _write_submit(assignment)
    submit.purpose = worker_pb2.Submit.PREFILL_ONLY
    submit.kv_holders.extend(map(_write_holder, assignment.kv_holders))
    return worker_pb2.SessionRequest(submit=submit)


def write_generate(assignment: Assignment, *, kv_source: Member | None) -> worker_pb2.SessionRequest:
    """`kv_source`: the worker that prefills the same assignment; None: this one computes the prompt itself."""
    submit = _write_submit(assignment)
    if kv_source is None:
        submit.kv_holders.extend(map(_write_holder, assignment.kv_holders))
    else:
        submit.kv_source.CopyFrom(_write_source(kv_source, request_id=assignment.request_id))
    return worker_pb2.SessionRequest(submit=submit)


def write_move(
    assignment: Assignment, *, source: Member, source_request_id: str
) -> worker_pb2.SessionRequest:
    """To go on with what runs at `source` under that id."""
    submit = _write_submit(assignment)
    submit.kv_source.CopyFrom(_write_source(source, request_id=source_request_id))
    submit.kv_source.is_live = True
    return worker_pb2.SessionRequest(submit=submit)


def _write_source(source: Member, *, request_id: str) -> worker_pb2.KvSource:
    return worker_pb2.KvSource(
        worker_id=source.worker_id,
        epoch=source.epoch,
        control_address=source.control_address,
        request_id=request_id,
    )


def _write_holder(holder: KvHolder) -> worker_pb2.KvHolder:
    return worker_pb2.KvHolder(
        worker_id=holder.member.worker_id,
        epoch=holder.member.epoch,
        control_address=holder.member.control_address,
        num_blocks=holder.num_blocks,
    )


def _write_submit(assignment: Assignment) -> worker_pb2.Submit:
    generation = assignment.generation
    return worker_pb2.Submit(
        request_id=assignment.request_id,
        prompt_token_ids=generation.prompt_token_ids,
        output_token_ids=assignment.output_token_ids,
        sampling=_write_sampling(generation.sampling),
        priority=generation.priority,
        cache_salt=generation.cache_salt,
        arrival_unix_s=assignment.arrival_unix_s,
        tenant=generation.tenant,
        tenant_weight=generation.tenant_weight,
        deadline_unix_s=generation.deadline_unix_s or 0.0,
    )


def _write_sampling(options: SamplingOptions) -> worker_pb2.SamplingParams:
    return worker_pb2.SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=dict(options.logit_bias),
        seed=options.seed,
        stop_token_ids=options.stop_token_ids,
        stop_strings=options.stop_strings,
        num_logprobs=options.num_logprobs,
        max_tokens=options.max_tokens,
        min_tokens=options.min_tokens,
        ignore_eos=options.ignore_eos,
    )
