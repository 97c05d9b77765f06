"""The puller of bench.kv_load: a worker that is ours in all but one thing, how it decides about a load.

    python -m bench.kv_load_puller MODE_FILE [flags of a worker]

The file says what to do, and may change between two requests: "adaptive" asks the controller, a number loads all of it
at that level of the codec, comparisons included.
"""

import sys
from pathlib import Path

from kvstore.streaming import StreamLimits, StreamPlan, StreamView, plan_stream
from workers import __main__ as worker
from workers import loading

ADAPTIVE = "adaptive"


def decide_by(mode_file: Path) -> None:
    def plan(view: StreamView, limits: StreamLimits) -> StreamPlan:
        mode = mode_file.read_text()
        if mode == ADAPTIVE:
            return plan_stream(view, limits)
        return StreamPlan(
            split=view.first_chunk,
            level=int(mode),
            choice="load",
            predicted_s=0.0,
            predicted_recompute_s=0.0,
            predicted_load_s=0.0,
        )

    loading.plan_stream = plan  # type: ignore[attr-defined]


if __name__ == "__main__":
    decide_by(Path(sys.argv[1]))
    sys.exit(worker.main(sys.argv[2:]))
