"""What to compute next: a pure function of what there is (`SchedulerView`) and what is allowed
(`SchedulerLimits`).

Order of a plan: one token for every request that decodes, then chunks of prompts already begun, then
admissions from the queue. There are no phases: a request computes from `num_computed_tokens` towards
`num_tokens`.

Who goes first is said by the view, in whose order requests come (workers.policies). Pages are handed out in that order,
and these rules make every request end:
- An admission takes the pages of all its known tokens at once, so a prompt never stops half-way for want of a
  page.
- Who lacks pages at the head of the queue is not overtaken, so those who run drain until it fits.
- A decode that lacks a page takes those of the lowest-ranked running request below it of which some come free
  (pages may be shared, or be pinned by who copies them); that one waits again and is recomputed. If there is none it
  keeps its pages and sits out the step: the highest-ranked one always goes on, unless pulls, held requests and pins
  own what it needs, and those end without us.
- A request that loads blocks is computed up to them and then has no row until they are in its pages; whoever loads
  them gives up in the end.
- Requests computed for another worker, or moving to one, are never preempted: it may be reading their pages.
- Beside running requests, an admission leaves one free page for each of them, or it would soon be preempted
  again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore.blocks import BLOCK_SIZE_TOKENS
from workers.moves import pages_for_move
from workers.pages import PagePool, num_pages_for
from workers.request import PageId, Purpose, Request, RequestId
from workers.step import Admission, Pull, ScheduledRequest, StepPlan

# Waiting requests that lack a turn and are passed over in one step: with thousands of them a step would look for longer
# than it computes.
MAX_PASSED_OVER = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerLimits:
    """Bounds of one step; `max_num_batched_tokens` must cover a token for each of `max_num_seqs` requests."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_num_pulls: int

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_num_pulls < 1:
            raise ValueError(
                "max_num_seqs and max_num_pulls must be at least 1, "
                f"got {self.max_num_seqs} and {self.max_num_pulls}"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be at least max_num_seqs ({self.max_num_seqs}), "
                f"got {self.max_num_batched_tokens}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerView:
    """The state as the scheduler may see it: a window, not a copy, void once the state changes. Read only."""

    running: Sequence[Request]  # by rank
    waiting: Iterable[Request]  # in turn
    num_pulling: int
    pages: PagePool


def schedule(view: SchedulerView, limits: SchedulerLimits) -> StepPlan:
    """Decides one step. Mutates nothing."""
    draft = _Draft(view, limits)
    draft.continue_decodes()
    draft.continue_prompts()
    # Preempted pages are for the decodes that lacked them; whoever waits can wait for one step more.
    if not draft.preempted:
        draft.admit()
    return StepPlan(
        rows=tuple(draft.rows),
        admissions=tuple(draft.admissions),
        pulls=tuple(draft.pulls),
        preempted=tuple(draft.preempted),
    )


def can_admit(view: SchedulerView, limits: SchedulerLimits, *, num_step_tokens: int) -> bool:
    """Whether one of those who wait finds room beside a step of so many tokens for those who run. Mutates nothing."""
    draft = _Draft(view, limits)
    draft.spend(num_step_tokens)
    draft.admit()
    return bool(draft.admissions or draft.pulls)


class _Draft:
    """A plan in the making."""

    def __init__(self, view: SchedulerView, limits: SchedulerLimits) -> None:
        self._view = view
        self._limits = limits
        self._pages = _PageDraft(view.pages)
        self._budget_tokens = limits.max_num_batched_tokens
        self.rows: list[ScheduledRequest] = []
        self.admissions: list[Admission] = []
        self.pulls: list[Pull] = []
        self.preempted: dict[RequestId, None] = {}
        self._num_growing = 0  # requests that may soon ask for one more page

    def spend(self, num_tokens: int) -> None:
        self._budget_tokens -= num_tokens

    def continue_decodes(self) -> None:
        for rank, request in enumerate(self._view.running):
            if request.num_tokens - request.num_computed_tokens != 1 or request.request_id in self.preempted:
                continue
            page_ids = request.page_ids
            if request.num_computed_tokens == len(page_ids) * BLOCK_SIZE_TOKENS:
                if not self._pages.num_available:
                    self._preempt_below(rank)
                if not self._pages.num_available:
                    continue
                page_ids = (*page_ids, *self._pages.take(1))
            self._add_row(request, request.num_computed_tokens, page_ids)

    def continue_prompts(self) -> None:
        for request in self._view.running:
            if self._budget_tokens == 0:
                return
            num_computed = request.num_computed_tokens
            is_prompt = request.num_tokens - num_computed > 1 and request.request_id not in self.preempted
            if is_prompt and request.computable_tokens(num_computed) > num_computed:
                self._add_row(request, num_computed, request.page_ids)

    def admit(self) -> None:
        limits, view = self._limits, self._view
        num_pulling, num_seqs = view.num_pulling, len(view.running) + view.num_pulling
        if num_seqs >= limits.max_num_seqs:
            return  # before anybody is asked for: with many tenants that alone takes a millisecond
        num_passed_over = 0
        self._num_growing = num_pulling + sum(r.purpose is Purpose.GENERATE for r in view.running)
        for request in view.waiting:
            if num_seqs >= limits.max_num_seqs or num_passed_over == MAX_PASSED_OVER:
                return
            pulls = request.kv_source is not None
            # These two lack a turn, not pages: others may overtake them without taking what they wait for.
            lacks_budget = self._budget_tokens == 0 and not request.loads
            if (num_pulling >= limits.max_num_pulls) if pulls else lacks_budget:
                num_passed_over += 1
                continue
            if not self._admit_one(request):
                return
            num_seqs += 1
            num_pulling += pulls
            self._num_growing += request.purpose is Purpose.GENERATE

    def _admit_one(self, request: Request) -> bool:
        # At least one token is computed here even if all of them are cached: its logits are what is wanted.
        cached = self._pages.cached_prefix(request, (request.num_tokens - 1) // BLOCK_SIZE_TOKENS)
        num_available = self._pages.num_available_beside(cached) - self._num_growing
        num_pages = num_pages_for(request.num_tokens)
        if request.kv_source is not None and request.kv_source.is_live:
            num_pages = pages_for_move(request, num_available=num_available + len(cached))
        num_new_pages = num_pages - len(cached)
        if num_new_pages > num_available:
            return False
        self._pages.share(cached)
        page_ids = (*cached, *self._pages.take(num_new_pages))
        if request.kv_source is not None:
            self.pulls.append(Pull(request=request, page_ids=page_ids, first_block=len(cached)))
        else:
            admission = Admission(request_id=request.request_id, page_ids=page_ids, first_block=len(cached))
            self.admissions.append(admission)
            num_computed = admission.num_cached_tokens
            if self._budget_tokens and request.computable_tokens(num_computed) > num_computed:
                self._add_row(request, num_computed, page_ids)
        return True

    def _preempt_below(self, rank: int) -> None:
        """Frees the pages of lower-ranked requests, lowest first, until there is a page or nobody is left."""
        for victim in reversed(self._view.running[rank + 1 :]):
            may_leave = victim.purpose is Purpose.GENERATE and not victim.is_moving
            # One whose pages others use or copy would be computed again for nothing.
            if (
                may_leave
                and victim.request_id not in self.preempted
                and self._pages.would_free(victim.page_ids)
            ):
                self.preempted[victim.request_id] = None
                self._pages.give_up(victim.page_ids)
                if self._pages.num_available:
                    return

    def _add_row(self, request: Request, num_computed_tokens: int, page_ids: tuple[PageId, ...]) -> None:
        num_left = request.computable_tokens(num_computed_tokens) - num_computed_tokens
        num_new_tokens = min(num_left, self._budget_tokens)
        self._budget_tokens -= num_new_tokens
        self.rows.append(
            ScheduledRequest(
                request=request,
                num_computed_tokens=num_computed_tokens,
                num_new_tokens=num_new_tokens,
                page_ids=page_ids,
                samples=num_computed_tokens + num_new_tokens == request.num_tokens,
            )
        )


class _PageDraft:
    """What a plan has taken, shared and given up so far, on top of a pool that it leaves alone."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._order = pool.available_in_order()
        self._taken: set[PageId] = set()
        self._shared: set[PageId] = set()  # idle in the pool, used by this plan for what they hold
        self._given_up: list[PageId] = []  # available again, to be taken from the end
        self._num_given_up: dict[PageId, int] = {}
        self.num_available = pool.num_available

    def take(self, num_pages: int) -> list[PageId]:
        """Pages to write to; there must be as many available."""
        taken: list[PageId] = []
        while len(taken) < num_pages:
            page_id = next(self._order, None)
            if page_id is None:
                page_id = self._given_up.pop()
            if page_id not in self._shared:
                taken.append(page_id)
        self._taken.update(taken)
        self.num_available -= num_pages
        return taken

    def cached_prefix(self, request: Request, max_blocks: int) -> list[PageId]:
        """The cached pages of the request's first blocks, up to one that this plan has taken for others."""
        page_ids = self._pool.longest_cached_prefix(request.block_keys, max_blocks)
        for position, page_id in enumerate(page_ids):
            if page_id in self._taken:
                return page_ids[:position]
        return page_ids

    def num_available_beside(self, cached: Sequence[PageId]) -> int:
        """How many pages could be taken once `cached` are shared."""
        return self.num_available - len(self._newly_shared(cached))

    def share(self, cached: Sequence[PageId]) -> None:
        newly_shared = self._newly_shared(cached)
        self._shared.update(newly_shared)
        self.num_available -= len(newly_shared)

    def would_free(self, page_ids: Sequence[PageId]) -> bool:
        """Whether there is a page among them that nobody else has."""
        return any(
            self._num_given_up.get(page_id, 0) + 1 == self._pool.ref_count(page_id) for page_id in page_ids
        )

    def give_up(self, page_ids: Sequence[PageId]) -> None:
        """One user less for these pages; those without a user can be taken, the last ones first."""
        for page_id in page_ids:
            num_given_up = self._num_given_up.get(page_id, 0) + 1
            self._num_given_up[page_id] = num_given_up
            if num_given_up == self._pool.ref_count(page_id):
                self._given_up.append(page_id)
                self.num_available += 1

    def _newly_shared(self, cached: Sequence[PageId]) -> list[PageId]:
        return [p for p in cached if self._pool.ref_count(p) == 0 and p not in self._shared]
