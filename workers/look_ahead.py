"""The step after one that is under way, decided before anybody knows what that one samples: a pure function.

A device that is given the next step while it computes never waits for this machine to read tokens, deliver them and
plan (as NanoFlow does: Zhu et al., 2024). The next step is what `schedule` would say if nobody came, ended or gave way:
a token for everyone who decodes, which lies on the device, and the next chunks of prompts. It is not said where that
would be another step: somebody who waits finds room, or a decode finds no page. Nor beside pulls, moves and loads, nor
for the last chunk of a prompt that is computed for another worker, whose layers are told one by one.

What cannot be known is who ends, with a token that ends texts or a stop token of its own: such a request has a row in
vain, whose result is dropped, its seat stays empty for a step, and the pages that it gives back may still be written
once. So none of what follows may be handed to anybody but steps, which run one after the other, until that step is over
too; which is why nothing is looked ahead beside anything else.
"""

from collections.abc import Iterator

from kvstore.blocks import BLOCK_SIZE_TOKENS
from workers.outputs import has_full_length
from workers.request import PageId, Purpose, Request
from workers.scheduler import SchedulerLimits, SchedulerView, can_admit
from workers.step import ScheduledRequest, StepPlan


def look_ahead(
    plan: StepPlan, view: SchedulerView, limits: SchedulerLimits, *, max_request_tokens: int
) -> StepPlan | None:
    """The step after `plan`, which has begun; None where it has to wait for what `plan` gives. Mutates nothing."""
    if plan.preempted or plan.pulls or view.num_pulling or not all(map(_is_only_computed, view.running)):
        return None
    is_awaited = any(True for _ in view.waiting)
    decoding: list[ScheduledRequest] = []
    prompts: list[tuple[Request, int]] = []  # and how far each will be
    of_plan = {row.request.request_id: row for row in plan.rows}
    for request in view.running:
        row = of_plan.get(request.request_id)
        if row is None or not row.samples:
            end_token = request.num_computed_tokens if row is None else row.end_token
            if row is None and request.num_tokens - end_token == 1:
                return None  # it decodes, and had no page
            prompts.append((request, end_token))
        elif request.purpose is Purpose.PREFILL_ONLY:
            return None
        elif not _ends_for_certain(row, max_request_tokens=max_request_tokens):
            decoding.append(row)
        elif is_awaited:
            return None
    pages = view.pages.available_in_order()
    if not view.pages.num_available >= sum(map(_needs_page, decoding)):
        return None
    rows = [_next_token(row, pages) for row in decoding]
    rows += _next_chunks(prompts, budget_tokens=limits.max_num_batched_tokens - len(rows))
    if any(row.samples and row.request.purpose is Purpose.PREFILL_ONLY for row in rows):
        return None
    if is_awaited and can_admit(view, limits, num_step_tokens=sum(row.num_new_tokens for row in rows)):
        return None
    return StepPlan(rows=tuple(rows)) if rows else None


def _is_only_computed(request: Request) -> bool:
    return not request.is_moving and not request.loads


def _needs_page(row: ScheduledRequest) -> bool:
    return row.end_token == len(row.page_ids) * BLOCK_SIZE_TOKENS


def _next_token(row: ScheduledRequest, pages: Iterator[PageId]) -> ScheduledRequest:
    return ScheduledRequest(
        request=row.request,
        num_computed_tokens=row.end_token,
        num_new_tokens=1,
        page_ids=(*row.page_ids, next(pages)) if _needs_page(row) else row.page_ids,
        samples=True,
    )


def _next_chunks(prompts: list[tuple[Request, int]], *, budget_tokens: int) -> Iterator[ScheduledRequest]:
    """Their pages they have: an admission takes those of all known tokens."""
    for request, start in prompts:
        num_new_tokens = min(request.num_tokens - start, budget_tokens)
        if num_new_tokens == 0:
            return
        budget_tokens -= num_new_tokens
        yield ScheduledRequest(
            request=request,
            num_computed_tokens=start,
            num_new_tokens=num_new_tokens,
            page_ids=request.page_ids,
            samples=start + num_new_tokens == request.num_tokens,
        )


def _ends_for_certain(row: ScheduledRequest, *, max_request_tokens: int) -> bool:
    return has_full_length(
        row.request.sampling,
        num_output_tokens=row.num_sampled_before + 1,
        num_tokens=row.end_token + 1,
        max_tokens=max_request_tokens,
    )
