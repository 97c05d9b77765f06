"""The loads of all requests of a worker: which of their blocks are claimed, come, and are in pages. Pure.

`workers.loads` says what may happen to one region; here are the requests that they belong to.
"""

from collections.abc import Mapping, Sequence

from kvstore.blocks import BLOCK_SIZE_TOKENS
from workers import loads, timeline
from workers.computed_blocks import ComputedBlocks
from workers.request import LoadRegion, PageId, Request, RequestId, Status
from workers.waiting import WaitingQueue


class LoadBook:
    """Of `EngineState`, whose requests these are. All but `place` and `jump` are safe while a step executes."""

    def __init__(
        self,
        requests: Mapping[RequestId, Request],
        running: Sequence[Request],
        waiting: WaitingQueue,
        computed: ComputedBlocks,
    ) -> None:
        self._requests = requests
        self._running = running
        self._waiting = waiting
        self._computed = computed

    def open(
        self, request_id: RequestId, *, first_block: int, end_block: int, now_s: float
    ) -> LoadRegion | None:
        """Claims blocks of a request to be loaded; None if none of them can be, or the request is not here."""
        request = self._requests.get(request_id)
        if request is None or request.status not in (Status.WAITING, Status.RUNNING):
            return None
        if request.kv_source is not None:
            return None  # its prompt comes as a whole
        region = loads.open_region(request, first_block=first_block, end_block=end_block)
        if region is not None:
            request.timeline.stamp_once(timeline.LOAD_STARTED, now_s)
            self._count(request)
        return region

    def move(self, request_id: RequestId, region: LoadRegion, first_block: int) -> None:
        """What is to be loaded begins there, as near as may be; at `end_block`: nothing more is."""
        request = self._loading(request_id, region)
        if request is not None:
            loads.move_region(request, region, first_block)
            self._count(request)

    def shorten(self, request_id: RequestId, region: LoadRegion, end_block: int) -> None:
        """Less can be loaded than was thought, and nothing of it is in pages yet."""
        request = self._loading(request_id, region)
        if request is not None:
            loads.shorten_region(request, region, end_block)
            self._count(request)

    def place(
        self, request_id: RequestId, region: LoadRegion, first_block: int, *, is_exact: bool, now_s: float
    ) -> None:
        """Blocks from `first_block` up to those placed before are in the pages: the request goes on from the last."""
        request = self._loading(request_id, region)
        if request is not None and request.status is Status.RUNNING:
            loads.place_blocks(region, first_block, is_exact=is_exact)
            self.jump(request, now_s=now_s)

    def fail(self, request_id: RequestId, region: LoadRegion, first_block: int, *, now_s: float) -> None:
        """No blocks before `first_block` come; what of them is not in pages is computed."""
        request = self._loading(request_id, region)
        if request is not None and region.first_block < min(first_block, region.placed_block):
            request.timeline.stamp(timeline.LOAD_FAILED, now_s)
            loads.move_region(request, region, first_block)
            self._count(request)

    def pages_to_fill(
        self, request_id: RequestId, region: LoadRegion, *, first_block: int, end_block: int
    ) -> tuple[PageId, ...]:
        """Of these blocks, as far as the request still waits for them: the last ones of the range."""
        request = self._loading(request_id, region)
        if request is None or request.status is not Status.RUNNING:
            return ()
        return request.page_ids[max(first_block, region.first_block) : end_block]

    def stalled(self) -> tuple[Request, ...]:
        """Running requests that can go on only once blocks have come."""
        return tuple(
            r
            for r in self._running
            if r.loads and r.computable_tokens(r.num_computed_tokens) == r.num_computed_tokens
        )

    def jump(self, request: Request, *, now_s: float) -> None:
        """Goes on behind the blocks that were loaded, if the request has come to them."""
        while (region := loads.arrived_region(request)) is not None:
            request.loads.remove(region)
            if region.first_lossy_block < region.end_block:
                request.lose_exactness(region.first_lossy_block * BLOCK_SIZE_TOKENS)
            num_loaded = (region.end_block - region.first_block) * BLOCK_SIZE_TOKENS
            self._computed.skip(request, region.end_block * BLOCK_SIZE_TOKENS)
            if request.timeline.first_s(timeline.PREEMPTED) is None:
                num_cached = request.num_cached_tokens + num_loaded
                request.num_cached_tokens = min(num_cached, request.num_prompt_tokens)
            if not request.loads:
                request.timeline.stamp(timeline.LOAD_DONE, now_s)

    def _count(self, request: Request) -> None:
        if request.status is Status.WAITING:
            self._waiting.count_loads(request)

    def _loading(self, request_id: RequestId, region: LoadRegion) -> Request | None:
        """The request, if it is here and still loads this region."""
        request = self._requests.get(request_id)
        return request if request is not None and region in request.loads else None
