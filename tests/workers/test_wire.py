import math

import pytest

from kvstore.blocks import FORMAT_VERSION
from kvstore.layout import KvLayout
from protos import worker_pb2
from workers.config import Role
from workers.errors import EngineFailed, InvalidRequest, QueueFull, WorkerDraining, WorkerError
from workers.identity import Identity
from workers.reports import Load
from workers.request import (
    FinishReason,
    KvHolder,
    KvSource,
    Purpose,
    RequestId,
    RequestOutput,
    SessionId,
    TokenLogprobs,
)
from workers.timeline import Stamp
from workers.wire import description_to_wire, output_to_wire, refusal_to_wire, request_from_wire

NOW_S = 1000.0


def _submit(**fields: object) -> worker_pb2.Submit:
    sampling = worker_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0, max_tokens=4)
    return worker_pb2.Submit(**({"request_id": "r", "prompt_token_ids": [5], "sampling": sampling} | fields))


def test_a_submit_becomes_a_request_with_every_field() -> None:
    sampling = worker_pb2.SamplingParams(
        temperature=0.5, top_k=7, top_p=0.25, min_p=0.125, repetition_penalty=1.5, presence_penalty=0.5,
        frequency_penalty=-0.5, logit_bias={9: 2.0, 3: -1.0}, seed=2**64 - 1, stop_token_ids=[4], min_tokens=1,
        stop_strings=["\n"], num_logprobs=0, max_tokens=8, ignore_eos=True,
    )  # fmt: skip
    source = worker_pb2.KvSource(worker_id="p", epoch=2**63 - 1, control_address="h:1", request_id="s")
    request = request_from_wire(
        _submit(
            output_token_ids=[6, 7], sampling=sampling, priority=-3, cache_salt="tenant", arrival_unix_s=990.0,
            kv_source=source, tenant="gold", tenant_weight=3.0, deadline_unix_s=1030.0,
        ),
        session_id=SessionId(2), now_s=NOW_S,
    )  # fmt: skip
    assert request.request_id == "r"
    assert request.session_id == 2
    assert request.prompt_token_ids == [5]
    assert request.output_token_ids == [6, 7]
    assert (request.priority, request.cache_salt, request.arrival_s) == (-3, "tenant", 990.0)
    assert (request.tenant, request.tenant_weight, request.deadline_s) == ("gold", 3.0, 1030.0)
    assert request.purpose is Purpose.GENERATE
    assert request.kv_source == KvSource(
        worker_id="p", epoch=2**63 - 1, control_address="h:1", request_id="s"
    )
    ours = request.sampling
    assert (ours.temperature, ours.top_k, ours.top_p, ours.min_p) == (0.5, 7, 0.25, 0.125)
    assert (ours.repetition_penalty, ours.presence_penalty, ours.frequency_penalty) == (1.5, 0.5, -0.5)
    assert ours.logit_bias == ((3, -1.0), (9, 2.0))
    assert (ours.seed, ours.stop_token_ids, ours.stop_strings) == (2**64 - 1, (4,), ("\n",))
    assert (ours.num_logprobs, ours.max_tokens, ours.min_tokens, ours.ignore_eos) == (0, 8, 1, True)


def test_without_tenant_weight_and_deadline_a_request_is_like_any_other() -> None:
    request = request_from_wire(_submit(), session_id=SessionId(1), now_s=NOW_S)
    assert (request.tenant, request.tenant_weight, request.deadline_s) == ("", 1.0, None)


@pytest.mark.parametrize("deadline_s", [-1.0, math.nan, math.inf])
def test_a_deadline_that_is_no_time_is_none(deadline_s: float) -> None:
    request = request_from_wire(_submit(deadline_unix_s=deadline_s), session_id=SessionId(1), now_s=NOW_S)
    assert request.deadline_s is None


def test_an_unset_number_of_logprobs_is_none_and_not_zero() -> None:
    request = request_from_wire(_submit(), session_id=SessionId(1), now_s=NOW_S)
    assert request.sampling.num_logprobs is None


@pytest.mark.parametrize("arrival_s", [0.0, -1.0, NOW_S + 5, math.nan, math.inf])
def test_an_arrival_that_cannot_be_is_now(arrival_s: float) -> None:
    request = request_from_wire(_submit(arrival_unix_s=arrival_s), session_id=SessionId(1), now_s=NOW_S)
    assert request.arrival_s == NOW_S


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"request_id": ""}, "request_id must have 1 to 256 characters, got 0"),
        ({"request_id": "x" * 257}, "got 257"),
        ({"purpose": 5}, "got 5"),
        ({"sampling": worker_pb2.SamplingParams()}, "repetition_penalty must be between"),
        ({"kv_source": worker_pb2.KvSource(worker_id="p")}, "kv_source needs control_address"),
        ({"tenant": "t" * 300}, "tenant must have at most 256 characters, got 300"),
        ({"tenant_weight": -1.0}, "tenant_weight must be between 0.001 and 1000, got -1"),
        ({"tenant_weight": math.nan}, "tenant_weight must be between"),
    ],
)
def test_what_a_message_alone_shows_to_be_wrong_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        request_from_wire(_submit(**fields), session_id=SessionId(1), now_s=NOW_S)


def test_an_output_says_everything() -> None:
    output = RequestOutput(
        request_id=RequestId("r"), session_id=SessionId(1), first_token_number=3, token_ids=(8,),
        logprobs=(TokenLogprobs(-0.5, ((8, -0.5), (9, -1.5))),), finish_reason=FinishReason.STOP,
        stop_string="end", num_cached_tokens=16, timeline=(Stamp("received", 1.5),),
    )  # fmt: skip
    assert output_to_wire(output) == worker_pb2.Output(
        request_id="r", first_token_number=3, token_ids=[8],
        logprobs=[worker_pb2.TokenLogprobs(logprob=-0.5, top_token_ids=[8, 9], top_logprobs=[-0.5, -1.5])],
        finish_reason=worker_pb2.FINISH_STOP, stop_string="end", num_cached_tokens=16,
        timeline=[worker_pb2.TimelineEvent(name="received", unix_s=1.5)],
    )  # fmt: skip


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_every_finish_reason_has_its_number(reason: FinishReason | None) -> None:
    output = RequestOutput(
        request_id=RequestId("r"), session_id=SessionId(1), first_token_number=0, finish_reason=reason
    )
    name = "FINISH_NONE" if reason is None else f"FINISH_{reason.name}"
    assert worker_pb2.FinishReason.Name(output_to_wire(output).finish_reason) == name


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("no"), worker_pb2.Failure.INVALID),
        (EngineFailed("no"), worker_pb2.Failure.INTERNAL),
        (QueueFull("no", retry_after_s=2.5), worker_pb2.Failure.OVERLOADED),
        (WorkerDraining("no"), worker_pb2.Failure.UNAVAILABLE),
    ],
)
def test_an_error_becomes_a_failure_with_its_code(
    error: WorkerError, code: "worker_pb2.Failure.Code.ValueType"
) -> None:
    refusal = refusal_to_wire("r", error)
    assert refusal.finish_reason == worker_pb2.FINISH_ERROR
    assert refusal.failure.code == code
    assert refusal.failure.message == "no"
    assert refusal.failure.retry_after_s == (2.5 if isinstance(error, QueueFull) else 0.0)


def test_a_description_says_who_we_are_and_how_busy() -> None:
    identity = Identity(
        worker_id="w", epoch=2**63 - 1, role=Role.DECODE, pid=7, control_address="h:1", data_address="tcp://h:2",
        model_name="m", fingerprint=b"f", max_model_len=99, vocab_size=260,
        layout=KvLayout(num_layers=2, num_kv_heads=3, head_dim=4, dtype="bfloat16"),
    )  # fmt: skip
    load = Load(
        num_running=1, num_waiting=2, num_pages=10, num_free_pages=4, num_waiting_tokens=5, num_leases=6,
        num_demanded_pages=7,
    )  # fmt: skip
    assert description_to_wire(identity, load, is_draining=True) == worker_pb2.WorkerDescription(
        worker_id="w", epoch=2**63 - 1, role=worker_pb2.ROLE_DECODE, control_address="h:1",
        data_address="tcp://h:2", pid=7, is_draining=True, block_format=FORMAT_VERSION,
        model=worker_pb2.ModelDescription(
            name="m", fingerprint=b"f", max_model_len=99, vocab_size=260,
            layout=worker_pb2.KvLayout(
                num_layers=2, num_kv_heads=3, head_dim=4, block_size_tokens=16, dtype="bfloat16"
            ),
        ),
        load=worker_pb2.WorkerLoad(
            num_running=1, num_waiting=2, num_pages=10, num_free_pages=4, num_waiting_tokens=5, num_leases=6,
            num_demanded_pages=7,
        ),
    )  # fmt: skip


def test_hints_that_say_nothing_or_are_too_many_are_passed_over() -> None:
    holders = [
        worker_pb2.KvHolder(worker_id="nobody", num_blocks=4),
        worker_pb2.KvHolder(worker_id="empty", control_address="h:1"),
        *(
            worker_pb2.KvHolder(worker_id=f"w{n}", epoch=n, control_address=f"h:{n}", num_blocks=4)
            for n in range(30)
        ),
    ]
    request = request_from_wire(_submit(kv_holders=holders), session_id=SessionId(1), now_s=NOW_S)
    assert [holder.worker_id for holder in request.kv_holders] == [f"w{n}" for n in range(14)]
    assert request.kv_holders[3] == KvHolder(worker_id="w3", epoch=3, control_address="h:3", num_blocks=4)
