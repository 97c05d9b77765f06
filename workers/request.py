"""What a user asked of a worker, and how far it has come."""

from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

from kvstore.blocks import BLOCK_SIZE_TOKENS, BlockKey
from workers.errors import WorkerError
from workers.timeline import Stamp, Timeline

RequestId = NewType("RequestId", str)
PageId = NewType("PageId", int)
SessionId = NewType("SessionId", int)


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    HANDED_OVER = "handed_over"


class Status(Enum):
    """Where a request is on its way.

    WAITING: owns nothing. PULLING: owns pages that a pull writes. RUNNING: computes.
    HELD: computed, its pages are kept for a puller. FROZEN: moves to another worker, which is sent the last of it.
    DOOMED: aborted while pulling; its pages stay its own until the pull has ended.
    """

    WAITING = "waiting"
    PULLING = "pulling"
    RUNNING = "running"
    HELD = "held"
    FROZEN = "frozen"
    DOOMED = "doomed"


class Purpose(Enum):
    """GENERATE: the whole answer. PREFILL_ONLY: the prompt and token 0; the KV is kept for a puller."""

    GENERATE = "generate"
    PREFILL_ONLY = "prefill_only"


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Validated at construction; `ValueError` names the offending value."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    num_logprobs: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_k", self.top_k, 0, 2**31 - 1)
        _in_range("top_p", self.top_p, 0.0, 1.0)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _in_range("seed", self.seed, 0, 2**64 - 1)
        _in_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _in_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        for token_id, bias in self.logit_bias:
            _in_range(f"logit_bias of token {token_id}", bias, -100.0, 100.0)
        if self.num_logprobs is not None:
            _in_range("num_logprobs", self.num_logprobs, 0, 20)
        if len(self.stop_strings) > 16 or "" in self.stop_strings:
            raise ValueError(f"stop takes at most 16 non-empty strings, got {len(self.stop_strings)}")


def _in_range(name: str, value: float, low: float, high: float) -> None:
    # Written so that NaN, which compares false with everything, is refused too.
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The chosen token's log-probability and those of the most likely tokens, most likely first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class KvSource:
    """The worker that computes a prompt's KV for us, and the id it knows the request by.

    `is_live`: the request itself runs there and moves here. What cannot be pulled is not computed here then.
    """

    worker_id: str
    epoch: int
    control_address: str
    request_id: str
    is_live: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class KvHolder:
    """A worker or a store that was said to hold the first `num_blocks` blocks of a request."""

    worker_id: str
    epoch: int
    control_address: str
    num_blocks: int


@dataclass(kw_only=True, slots=True, eq=False)
class LoadRegion:
    """Blocks [first_block, end_block) of a request, which are loaded and not computed; see workers.loads."""

    first_block: int  # computing stops here
    end_block: int
    placed_block: int  # blocks from here on are in the request's pages
    first_lossy_block: int  # of these; end_block if they are exact


@dataclass(kw_only=True, slots=True, eq=False)
class Request:
    """A request on this worker. `num_computed_tokens` chases `num_tokens`; there is no other notion of phase.

    Mutated only by `EngineState`, between steps.
    """

    request_id: RequestId
    session_id: SessionId
    prompt_token_ids: list[int]
    sampling: SamplingParams
    arrival_s: float
    priority: int = 0
    tenant: str = ""
    tenant_weight: float = 1.0
    deadline_s: float | None = None  # by which its first token is wanted, since the Unix epoch
    cache_salt: str = ""
    purpose: Purpose = Purpose.GENERATE
    kv_source: KvSource | None = None
    kv_holders: tuple[KvHolder, ...] = ()  # hints, best first
    output_token_ids: list[int] = field(default_factory=list)
    output_logprobs: list[TokenLogprobs] = field(
        default_factory=list
    )  # of the last output tokens, if asked for
    is_moving: bool = False  # another worker pulls it while it runs: its pages must stay
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0  # what will be computed when the step that executes has ended
    num_charged_tokens: int = 0  # its tenant has paid for these; see workers.tenants
    num_cached_tokens: int = 0
    num_exact_tokens: int | None = (
        None  # KV from here on may differ from what the model computes; None: all is exact
    )
    loads: list[LoadRegion] = field(default_factory=list)  # in token order
    page_ids: tuple[PageId, ...] = ()
    status: Status = Status.WAITING
    root: BlockKey = field(default=BlockKey(b""))  # of its chain, once it is queued
    block_keys: list[BlockKey] = field(default_factory=list)  # of the full blocks of known tokens, in order
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def computable_tokens(self, num_computed_tokens: int) -> int:
        """How far the request may be computed from `num_computed_tokens` on: to its end or to the next load."""
        for region in self.loads:
            if region.end_block * BLOCK_SIZE_TOKENS > num_computed_tokens:
                return max(region.first_block * BLOCK_SIZE_TOKENS, num_computed_tokens)
        return self.num_tokens

    def is_exact_to(self, num_tokens: int) -> bool:
        """Whether the KV of the first `num_tokens` tokens is exactly what the model computes."""
        return self.num_exact_tokens is None or num_tokens <= self.num_exact_tokens

    def lose_exactness(self, num_exact_tokens: int) -> None:
        """From `num_exact_tokens` on, if not from earlier, the KV is not exactly what the model computes."""
        if self.is_exact_to(num_exact_tokens + 1):
            self.num_exact_tokens = num_exact_tokens

    def token_range(self, start: int, stop: int) -> list[int]:
        """Tokens start..stop-1 of prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - num_prompt]


@dataclass(frozen=True, kw_only=True, slots=True)
class Handoff:
    """All of a request that is not KV, as the source of a hand-over sends it; also of one that moves while it runs.

    `output_token_ids` is the whole output, with the tokens given at submit; `logprobs` are of its last
    tokens, one each.

    Sampling needs no further state: a draw depends on the seed and the token's number alone, penalties on the
    tokens.
    """

    num_computed_tokens: int
    output_token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    num_cached_tokens: int = 0
    num_exact_tokens: int | None = None  # as in Request
    timeline: tuple[Stamp, ...] = ()  # so far


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """What a request has to say after a step: new tokens, its end, or both.

    `timeline` comes with the first tokens here and, longer, with the end.
    """

    request_id: RequestId
    session_id: SessionId
    first_token_number: int  # of token_ids[0] within the request's output, counted from 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token if the request asked for them
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    num_cached_tokens: int = 0
    failure: WorkerError | None = None  # with FinishReason.ERROR
    timeline: tuple[Stamp, ...] = ()
