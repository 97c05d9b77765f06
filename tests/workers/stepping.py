"""States, requests for them, and steps in which every request that samples gets the same token."""

from collections.abc import Sequence

from workers.request import (
    KvSource,
    Purpose,
    Request,
    RequestId,
    RequestOutput,
    SamplingParams,
    SessionId,
)
from workers.scheduler import SchedulerLimits, schedule
from workers.state import EngineState, StateLimits
from workers.step import SampledToken, StepResult

SOURCE = KvSource(worker_id="p", epoch=1, control_address="unix:/p", request_id="r")
EOS = 0


def new_state(
    *, num_pages: int = 100, max_model_len: int = 1000, vocab_size: int = 10_000, max_num_waiting: int = 100
) -> EngineState:
    return EngineState(
        StateLimits(
            num_pages=num_pages,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            eos_token_ids=frozenset({EOS}),
            model_fingerprint=b"model",
            max_num_waiting=max_num_waiting,
        )
    )


def new_request(
    name: str = "r",
    *,
    prompt: Sequence[int] = (1, 2, 3),
    output: Sequence[int] = (),
    sampling: SamplingParams | None = None,
    purpose: Purpose = Purpose.GENERATE,
    kv_source: KvSource | None = None,
    priority: int = 0,
    arrival_s: float = 0.0,
    cache_salt: str = "",
) -> Request:
    return Request(
        request_id=RequestId(name),
        session_id=SessionId(1),
        prompt_token_ids=list(prompt),
        output_token_ids=list(output),
        sampling=sampling or SamplingParams(max_tokens=100),
        arrival_s=arrival_s,
        priority=priority,
        purpose=purpose,
        kv_source=kv_source,
        cache_salt=cache_salt,
    )


LIMITS = SchedulerLimits(max_num_batched_tokens=64, max_num_seqs=8, max_num_pulls=2)


def step(
    state: EngineState, sampled: SampledToken | int = 1, *, step_s: float = 0.0, now_s: float = 0.0
) -> tuple[RequestOutput, ...]:
    """One step, ending at `now_s`, in which every request that samples gets the same token."""
    token = SampledToken(sampled) if isinstance(sampled, int) else sampled
    plan = schedule(state.view(), LIMITS)
    result = StepResult(sampled={row.request.request_id: token for row in plan.rows if row.samples})
    state.begin(plan, now_s=now_s - step_s)
    outputs = state.apply(plan, result, now_s=now_s)
    state.check()
    return outputs
