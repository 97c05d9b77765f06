"""What the gateway asks of the worker pools and what comes back, free of HTTP and of protobuf."""

from dataclasses import dataclass
from enum import Enum


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """Already validated. Fields as in worker.proto; the seed is always set."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    num_logprobs: int | None = None
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One sequence to generate; `n` choices are `n` of these."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingOptions
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""  # whose share it uses; empty: that of all who have no name
    tenant_weight: float = 1.0
    deadline_unix_s: float | None = None  # by which its first token is wanted


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """What a worker noted about a generation: names as in worker.proto, seconds since the Unix epoch by its clock."""

    name: str
    unix_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenChunk:
    """New tokens of one generation, in order, no gaps, no repeats; `finish_reason` is set in the last chunk only.

    `events` is empty in most chunks; where it is not, it replaces what an earlier chunk said.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_string: str | None = None  # the stop string that ended the generation
    events: tuple[WorkerEvent, ...] = ()
