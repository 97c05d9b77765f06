"""What the controller is told before anything was measured."""

import pytest

from kvstore.codec.codec import KvCodec
from kvstore.layout import KvLayout
from kvstore.stream_estimates import LinkEstimate
from workers.cost_model import CostModel
from workers.load_parts import Sources
from workers.load_plan import Moment, StreamPlanner, chunk_spans, level_estimates
from workers.request import Request, RequestId, SamplingParams, SessionId

SMALL = KvLayout(num_layers=4, num_kv_heads=4, head_dim=32, dtype="float32")
LARGE = KvLayout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")  # eight billion parameters


def make_request() -> Request:
    return Request(
        request_id=RequestId("r"),
        session_id=SessionId(1),
        prompt_token_ids=[1] * 1025,
        sampling=SamplingParams(),
        arrival_s=0.0,
    )


@pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["small model", "large model"])
def test_a_worker_that_knows_nothing_yet_loads_all_that_its_disk_has(layout: KvLayout) -> None:
    sources = Sources(levels=level_estimates(KvCodec(layout, profile=None).levels, layout))
    request = make_request()
    spans = chunk_spans(0, 64, chunk_blocks=16)
    planner = StreamPlanner(
        request, spans, costs=CostModel(tokens_per_step=512), link=sources.disk, max_level=0
    )
    plan = planner.plan(sources.levels.costs(), Moment(now_s=0.0, queue_s=0.0, time_left_s=0.5))
    assert (plan.choice, planner.first_block(plan)) == ("load", 0)


@pytest.mark.parametrize(("output", "level"), [([], 1), ([7], 0)])
def test_a_request_that_has_said_something_goes_on_from_exact_kv_only(output: list[int], level: int) -> None:
    request, sources = (
        make_request(),
        Sources(levels=level_estimates(KvCodec(LARGE, profile=None).levels, LARGE)),
    )
    request.output_token_ids += output
    planner = StreamPlanner(
        request, chunk_spans(0, 64, chunk_blocks=16), costs=CostModel(tokens_per_step=512),
        link=LinkEstimate(prior_bytes_s=2e7), max_level=1,
    )  # fmt: skip
    assert (
        planner.plan(sources.levels.costs(), Moment(now_s=0.0, queue_s=0.0, time_left_s=0.5)).level == level
    )


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_kv_of_8_bits_costs_its_bytes_with_the_scales_and_comes_raw_alone(dtype: str) -> None:
    layout = KvLayout(num_layers=4, num_kv_heads=4, head_dim=32, dtype=dtype)
    [cost] = level_estimates(KvCodec(layout, profile=None).levels, layout).costs()
    assert cost.bytes_per_token == layout.block_bytes / 16 == 4 * 2 * 4 * (32 + 4)
