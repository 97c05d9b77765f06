"""The step after one that is under way, decided before anybody knows what that one samples: a pure function.

A device that is given the next step while it computes never waits for this machine to read tokens, deliver them and
plan. That can be done where nothing but decoding goes on: every row of the step samples, all of them will want one more
token, there are pages for it, nobody loads, moves or is computed for others, and whoever waits has to wait on, because
no seat and no page comes free. The token itself lies on the device. What cannot be known is who ends, with a token that
ends texts or a stop token of its own: such a request has a row in vain, whose result is dropped, its seat stays empty
for a step, and the pages that it gives back may still be written once. So none of what follows may be handed to anybody
but steps, which run one after the other, until that step is over too; which is why nothing is looked ahead beside
anything else.
"""

from kvstore.blocks import BLOCK_SIZE_TOKENS
from workers.outputs import has_full_length
from workers.request import Purpose
from workers.scheduler import SchedulerLimits, SchedulerView, can_admit
from workers.step import ScheduledRequest, StepPlan


def look_ahead(
    plan: StepPlan, view: SchedulerView, limits: SchedulerLimits, *, max_request_tokens: int
) -> StepPlan | None:
    """The step after `plan`, which has begun; None where it has to wait for what `plan` gives. Mutates nothing."""
    if plan.preempted or plan.pulls or view.num_pulling or len(view.running) != len(plan.rows):
        return None
    if not all(map(_only_decodes, plan.rows)):
        return None
    going_on = [row for row in plan.rows if not _ends_for_certain(row, max_request_tokens=max_request_tokens)]
    is_awaited = any(True for _ in view.waiting)
    if is_awaited and (
        len(going_on) < len(plan.rows) or can_admit(view, limits, num_step_tokens=len(going_on))
    ):
        return None
    fresh = view.pages.available_in_order()
    num_available = view.pages.num_available
    rows: list[ScheduledRequest] = []
    for row in going_on:
        page_ids = row.page_ids
        if row.end_token == len(page_ids) * BLOCK_SIZE_TOKENS:
            if not num_available:
                return None
            page_ids, num_available = (*page_ids, next(fresh)), num_available - 1
        rows.append(
            ScheduledRequest(
                request=row.request,
                num_computed_tokens=row.end_token,
                num_new_tokens=1,
                page_ids=page_ids,
                samples=True,
            )
        )
    return StepPlan(rows=tuple(rows)) if rows else None


def _only_decodes(row: ScheduledRequest) -> bool:
    """From this step on."""
    request = row.request
    return row.samples and request.purpose is Purpose.GENERATE and not request.is_moving and not request.loads


def _ends_for_certain(row: ScheduledRequest, *, max_request_tokens: int) -> bool:
    return has_full_length(
        row.request.sampling,
        num_output_tokens=row.num_sampled_before + 1,
        num_tokens=row.end_token + 1,
        max_tokens=max_request_tokens,
    )
