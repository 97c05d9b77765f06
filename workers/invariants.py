"""What holds for every request between two steps. AssertionError is a bug of ours."""

from itertools import pairwise

from kvstore.blocks import BLOCK_SIZE_TOKENS
from workers.pages import num_pages_for
from workers.request import Request, Status


def prove_request(request: Request) -> None:
    num_pages, num_computed = len(request.page_ids), request.num_computed_tokens
    assert num_computed <= num_pages * BLOCK_SIZE_TOKENS, "computed tokens have no page"
    assert len(set(request.page_ids)) == num_pages, "a page holds two blocks of one request"
    assert len(request.block_keys) <= request.num_tokens // BLOCK_SIZE_TOKENS
    match request.status:
        case Status.WAITING:
            assert num_pages == 0
            assert num_computed == request.num_scheduled_tokens == 0
        case Status.RUNNING:
            assert num_computed < request.num_tokens
            # All known tokens have pages, but for the one that a decode step is about to compute.
            assert num_pages >= num_pages_for(request.num_tokens - 1)
        case Status.PULLING | Status.DOOMED:
            # One that moves here may have grown meanwhile.
            assert num_pages >= num_pages_for(request.num_tokens)
        case Status.HELD:
            assert num_computed == request.num_tokens - 1
        case Status.FROZEN:
            assert num_computed < request.num_tokens
    _prove_loads(request)


def _prove_loads(request: Request) -> None:
    loads = request.loads
    if not loads:
        return
    assert request.status in (Status.WAITING, Status.RUNNING), f"a request that is {request.status} loads"
    assert loads[-1].end_block * BLOCK_SIZE_TOKENS < request.num_tokens, "no token is left to compute"
    front = max(request.num_computed_tokens, request.num_scheduled_tokens)
    assert loads[0].first_block * BLOCK_SIZE_TOKENS >= front, "a block is computed and loaded"
    assert all(a.end_block <= b.first_block for a, b in pairwise(loads)), "a block is loaded twice"
    for region in loads:
        assert region.first_block < region.end_block
        assert region.first_block <= region.placed_block <= region.end_block
        assert region.placed_block <= region.first_lossy_block <= region.end_block
        is_placed = region.placed_block < region.end_block
        assert request.status is Status.RUNNING or not is_placed, "blocks are placed in no page"
