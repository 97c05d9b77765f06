"""The largest step that a scheduler can plan, to be run before there are pages: all its tokens go to page 0."""

from dataclasses import dataclass

from workers.request import PageId, Request, RequestId, SamplingParams, SessionId
from workers.step import ScheduledRequest, StepPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class LargestStep:
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512

    def plan(self, *, max_model_len: int, block_size_tokens: int) -> StepPlan:
        """Every request that may run has a row and samples; what is left of the tokens is one prompt's, or several's.

        Each way of sampling has half of the rows: both together copy as many logits as one of them can.
        """
        page_ids = (PageId(0),) * -(-max_model_len // block_size_tokens)
        rows: list[ScheduledRequest] = []
        num_left = self.max_num_batched_tokens
        for number in range(self.max_num_seqs):
            num_others = self.max_num_seqs - number - 1  # each of whom has a token
            count = max(1, min(num_left - num_others, max_model_len))
            num_left -= count
            rows.append(
                ScheduledRequest(
                    request=_request(number, num_tokens=max_model_len),
                    num_computed_tokens=max_model_len - count,
                    num_new_tokens=count,
                    page_ids=page_ids,
                    samples=True,
                )
            )
        return StepPlan(rows=tuple(rows))


def _request(number: int, *, num_tokens: int) -> Request:
    return Request(
        request_id=RequestId(f"profile-{number}"),
        session_id=SessionId(0),
        prompt_token_ids=[0] * num_tokens,
        sampling=SamplingParams(top_k=1, num_logprobs=1 if number % 2 else None),
        arrival_s=0.0,
    )
