"""The puller of bench.kv_load: a worker that is ours in all but one thing, how it decides about a load.

    python -m bench.kv_load_puller MODE_FILE [flags of a worker]

The file says what to do, and may change between two requests: "adaptive" asks the controller, a number loads all of it
at that level of the codec, comparisons included, and waits for it however long it takes.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kvstore.codec.levels import Level
from kvstore.layout import KvLayout
from kvstore.stream_estimates import LevelEstimates
from kvstore.streaming import StreamLimits, StreamPlan, StreamView, plan_stream
from workers import __main__ as worker
from workers import load_plan
from workers.request_load import RequestLoad

ADAPTIVE = "adaptive"


def decide_by(mode_file: Path) -> None:
    """To be called before the worker's other modules are imported: they take the names as they find them."""
    level_estimates, patience_s = load_plan.level_estimates, RequestLoad.patience_s

    def plan(view: StreamView, limits: StreamLimits) -> StreamPlan:
        mode = mode_file.read_text()
        plan = plan_stream(view, limits)
        if mode == ADAPTIVE:
            return plan
        return replace(plan, split=view.first_chunk, level=int(mode), choice="load")

    def all_levels(levels: Sequence[Level], layout: KvLayout) -> LevelEstimates:
        return level_estimates([replace(level, is_comparison=False) for level in levels], layout)

    def patience(self: RequestLoad) -> float:
        return patience_s(self) if mode_file.read_text() == ADAPTIVE else float("inf")

    load_plan.plan_stream = plan  # type: ignore[attr-defined]
    load_plan.level_estimates = all_levels
    RequestLoad.patience_s = patience  # type: ignore[method-assign]


if __name__ == "__main__":
    decide_by(Path(sys.argv[1]))
    sys.exit(worker.main(sys.argv[2:]))
