"""Which part of a prompt is loaded from one source, decided anew before every chunk: the controller, fed.

`kvstore.streaming` decides; here is what it must be told of the request, of the engine and of the source.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvstore.blocks import BLOCK_SIZE_TOKENS
from kvstore.codec.levels import RAW, Level
from kvstore.layout import KvLayout
from kvstore.stream_estimates import LevelEstimates, LinkEstimate
from kvstore.streaming import LevelCost, StreamLimits, StreamPlan, StreamView, plan_stream, regret_s
from workers.cost_model import CostModel
from workers.request import Request

# Of a token, while the engine has computed no prompt yet: a small model on one core.
UNKNOWN_COMPUTE_S_PER_TOKEN = 0.001
# Of the codec on one core, until it was measured.
PRIOR_DECODE_S_PER_BYTE = 5e-9


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks [first_block, end_block) of a request, which travel as one chunk."""

    first_block: int
    end_block: int

    @property
    def num_blocks(self) -> int:
        return self.end_block - self.first_block


def chunk_spans(first_block: int, end_block: int, *, chunk_blocks: int) -> list[Span]:
    """In token order; all but the last are whole."""
    starts = range(first_block, end_block, chunk_blocks)
    return [Span(start, min(start + chunk_blocks, end_block)) for start in starts]


def level_estimates(levels: Sequence[Level], layout: KvLayout) -> LevelEstimates:
    """What the codec says of the levels that a load may use."""
    bytes_per_token = layout.block_bytes / BLOCK_SIZE_TOKENS
    values_per_token = bytes_per_token / layout.bytes_per_value
    return LevelEstimates(
        [
            LevelCost(
                level=level.number,
                bytes_per_token=values_per_token * level.bytes_per_value,
                decode_s_per_token=0.0 if level.number == RAW else bytes_per_token * PRIOR_DECODE_S_PER_BYTE,
            )
            for level in levels
            if not level.is_comparison
        ]
    )


def compute_s(costs: CostModel, *, first_block: int, end_block: int) -> float:
    """What these blocks take to compute here."""
    num_tokens = (end_block - first_block) * BLOCK_SIZE_TOKENS
    seconds = costs.seconds(first_block * BLOCK_SIZE_TOKENS, num_tokens)
    return num_tokens * UNKNOWN_COMPUTE_S_PER_TOKEN if seconds is None else seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """When the controller is asked."""

    now_s: float
    queue_s: float  # until the engine goes on with the request
    time_left_s: float  # to the objective


class StreamPlanner:
    """Of the part of one request that one source has, from the last chunk to the first."""

    def __init__(
        self, request: Request, spans: Sequence[Span], *, costs: CostModel, link: LinkEstimate, max_level: int
    ) -> None:
        self._request = request
        self._spans = spans
        self._costs = costs
        self._link = link
        # What a client has read already must be gone on with as it would have been: from exact KV.
        self._limits = StreamLimits(max_level=0 if request.output_token_ids else max_level)
        self._end_chunk = len(spans)
        self._pending_bytes = 0.0
        self._first_view: StreamView | None = None

    @property
    def next_span(self) -> Span:
        return self._spans[self._end_chunk - 1]

    def first_block(self, plan: StreamPlan) -> int:
        """Of what the plan loads, or has loaded."""
        if plan.split < len(self._spans):
            return self._spans[plan.split].first_block
        return self._spans[-1].end_block

    def plan(self, levels: Sequence[LevelCost], moment: Moment) -> StreamPlan:
        """What to do now; later the answer may be another."""
        view = self._view(levels, moment)
        if self._first_view is None:
            self._first_view = view
        return plan_stream(view, self._limits)

    def is_over(self, plan: StreamPlan) -> bool:
        return plan.split == self._end_chunk

    def asked(self, cost: LevelCost) -> None:
        """The next chunk was asked for."""
        self._pending_bytes += cost.bytes_per_token * self.next_span.num_blocks * BLOCK_SIZE_TOKENS
        self._end_chunk -= 1

    def came(self, cost: LevelCost, span: Span) -> None:
        expected_bytes = cost.bytes_per_token * span.num_blocks * BLOCK_SIZE_TOKENS
        self._pending_bytes = max(0.0, self._pending_bytes - expected_bytes)

    def regret_s(self, actual_s: float, levels: Sequence[LevelCost], *, now_s: float) -> float:
        """How much sooner another choice would have been, by what was measured since the first plan."""
        if self._first_view is None:
            return 0.0
        hindsight = replace(
            self._first_view, levels=levels, throughput_bytes_s=self._link.throughput_bytes_s(now_s=now_s)
        )
        return regret_s(actual_s, plan_stream(hindsight, self._limits))

    def _view(self, levels: Sequence[LevelCost], moment: Moment) -> StreamView:
        spans, request = self._spans, self._request
        num_computed = max(request.num_computed_tokens, request.num_scheduled_tokens)
        first_chunk = sum(span.first_block * BLOCK_SIZE_TOKENS < num_computed for span in spans)
        throughput_bytes_s = self._link.throughput_bytes_s(now_s=moment.now_s)
        num_tail = request.num_tokens - spans[-1].end_block * BLOCK_SIZE_TOKENS
        return StreamView(
            chunk_blocks=[span.num_blocks for span in spans],
            compute_s=[
                compute_s(self._costs, first_block=span.first_block, end_block=span.end_block)
                for span in spans
            ],
            first_chunk=min(first_chunk, self._end_chunk),
            end_chunk=self._end_chunk,
            levels=levels,
            throughput_bytes_s=throughput_bytes_s,
            latency_s=self._link.latency_s,
            pending_s=self._pending_bytes / throughput_bytes_s,
            queue_s=moment.queue_s,
            tail_s=self._costs.seconds(request.num_tokens - num_tail, num_tail) or 0.0,
            time_left_s=moment.time_left_s,
        )
