"""Preempted requests whose blocks come back from memory instead of being computed again, where that is sooner.

Most blocks have a copy when a request is preempted: they are copied down as they fill, and copies from earlier turns
are still clean (workers.write_behind). The rest is copied at once, in its pages, which nobody gets meanwhile. When all
are down, and before the request can have pages again, its load begins; it runs beside the steps of the others.
"""

from kvstore.tiers.tier import BlockRun
from workers.computed_blocks import ComputedRun
from workers.cost_model import CostModel
from workers.load_plan import compute_s
from workers.loading import Loader
from workers.request import Request, RequestId, Status
from workers.state import EngineState
from workers.write_behind import WriteBehind


class Swap:
    """All methods are called in the event loop's thread, and return at once."""

    def __init__(
        self, state: EngineState, loader: Loader, write_behind: WriteBehind, *, costs: CostModel
    ) -> None:
        self._state = state
        self._loader = loader
        self._write_behind = write_behind
        self._costs = costs
        self._preempted: dict[RequestId, Request] = {}  # whose loads have not begun

    def preempted(self, request: Request) -> None:
        """It has just lost its pages; what they held is still there, but for what others took."""
        self._loader.end(request.request_id)
        # Pages for the next block of everybody who runs stay out of it: no step is to wait for a copy.
        load = self._state.load()
        page_ids = self._state.exact_pages(request.block_keys)[
            : max(0, load.num_free_pages - load.num_running)
        ]
        if page_ids and self.is_sooner(len(page_ids)):
            keys = tuple(request.block_keys[: len(page_ids)])
            run = BlockRun(root=request.root, parent=request.root, first_position=0, keys=keys)
            self._write_behind.save_at_once(ComputedRun(run=run, page_ids=page_ids))
        self._preempted[request.request_id] = request

    def settle(self) -> None:
        """Before a step is decided, so that what can be loaded is not computed."""
        for request_id, request in list(self._preempted.items()):
            if request.status is Status.WAITING and self._write_behind.is_on_its_way(request.block_keys):
                continue
            del self._preempted[request_id]
            if request.status is Status.WAITING and self.is_sooner(len(request.block_keys)):
                self._loader.begin(request)

    def gone(self, request_id: RequestId) -> None:
        self._preempted.pop(request_id, None)

    def is_sooner(self, num_blocks: int) -> bool:
        """Whether so many blocks are sooner copied, down and up, than computed."""
        swap_s = 2 * self._write_behind.copy_s(num_blocks)
        return swap_s < compute_s(self._costs, first_block=0, end_block=num_blocks)
