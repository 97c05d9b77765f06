"""What the loop tells those who move blocks between device pages and the tiers below: loads up, write-behind down."""

from collections.abc import Sequence

from kvstore.blocks import BlockKey
from workers.computed_blocks import ComputedRun
from workers.cost_model import CostModel
from workers.loading import Loader
from workers.request import Request, RequestId
from workers.step import StepPlan
from workers.swap import Swap
from workers.write_behind import WriteBehind


class TierTraffic:
    """All methods but `drop` and `close` return at once."""

    def __init__(self, loader: Loader, write_behind: WriteBehind, *, swap: Swap, costs: CostModel) -> None:
        self._loader = loader
        self._write_behind = write_behind
        self._swap = swap
        self._costs = costs

    @property
    def is_quiet(self) -> bool:
        """Nothing is on its way to or from device pages."""
        return self._loader.num_tasks == self._write_behind.num_pinned == 0

    @property
    def num_writing_blocks(self) -> int:
        """On their way from device pages to memory."""
        return self._write_behind.num_pinned

    def queued(self, request: Request) -> None:
        self._loader.begin(request)

    def step_began(self, plan: StepPlan, preempted: Sequence[Request]) -> None:
        self._write_behind.step_began()
        for request in preempted:
            self._swap.preempted(request)
        for admission in plan.admissions:
            self._loader.admitted(admission.request_id)

    def step_ended(self, plan: StepPlan, *, step_s: float) -> None:
        rows = ((row.num_computed_tokens, row.num_new_tokens) for row in plan.rows)
        self._costs.observe(rows, step_s=step_s)

    def moved(self, computed: Sequence[ComputedRun]) -> None:
        """Requests may have gone on, and blocks become cached."""
        for run in computed:
            self._write_behind.take(run)
        self._swap.settle()
        self._loader.watch()

    def rested(self) -> None:
        """The engine has nothing to do."""
        self._write_behind.rested()

    def gone(self, request_id: RequestId) -> None:
        self._swap.gone(request_id)
        self._loader.end(request_id)

    async def drop(self, root: BlockKey | None) -> None:
        """Of this root, or at all, nothing that was computed is on its way down any more."""
        await self._write_behind.drop(root)

    async def close(self) -> None:
        await self._loader.close()
        await self._write_behind.close()
