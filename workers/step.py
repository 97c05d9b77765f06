"""One engine step as data: what the scheduler decides and what the engine answers."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.blocks import BLOCK_SIZE_TOKENS
from workers.request import PageId, Request, RequestId, TokenLogprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledRequest:
    """One row of a step: compute `num_new_tokens` tokens of `request`, from `num_computed_tokens` on."""

    request: Request  # read-only for whoever executes the plan
    num_computed_tokens: int  # at the start of the step
    num_new_tokens: int
    page_ids: tuple[PageId, ...]  # all pages of the request, old and new, in token order; enough for the step
    samples: bool  # the step reaches the last token, so a new one is sampled

    @property
    def end_token(self) -> int:
        return self.num_computed_tokens + self.num_new_tokens

    @property
    def num_sampled_before(self) -> int:
        """The number, counted from 0, of the token that the row samples within the request's output. What was sampled
        before it may not be known here yet (`workers.look_ahead`)."""
        return self.end_token - self.request.num_prompt_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """A waiting request that starts (or resumes) now. It has no row if all that it could begin with is loaded."""

    request_id: RequestId
    page_ids: tuple[PageId, ...]  # of all its tokens, in token order
    first_block: int  # blocks before it are cached

    @property
    def num_cached_tokens(self) -> int:
        return self.first_block * BLOCK_SIZE_TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class Pull:
    """A waiting request whose prompt KV comes from another worker: pages reserved, the pull may begin."""

    request: Request
    page_ids: tuple[
        PageId, ...
    ]  # of all prompt blocks, in token order; of one that moves, and may grow, for more
    first_block: int  # blocks before it were cached here already

    @property
    def is_live(self) -> bool:
        """The request runs at its source until then."""
        return self.request.kv_source is not None and self.request.kv_source.is_live


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """All that one step does. The state records it in this order: preemptions, admissions, pulls, rows.

    New pages in it may hold blocks that nobody uses; taking them evicts those.
    """

    rows: tuple[ScheduledRequest, ...] = ()
    admissions: tuple[Admission, ...] = ()
    pulls: tuple[Pull, ...] = ()
    preempted: tuple[RequestId, ...] = ()  # lose their pages and wait again, to be loaded or recomputed

    @property
    def is_empty(self) -> bool:
        """Nothing to do until something happens outside: a submission, the end of a pull or a load, a release."""
        return not (self.rows or self.admissions or self.pulls or self.preempted)


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None = None
    stop_string: str | None = None  # the stop string that this token completed, if any


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """One sampled token for every row that samples."""

    sampled: Mapping[RequestId, SampledToken]
