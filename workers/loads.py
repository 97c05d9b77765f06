"""Blocks of a request that are loaded instead of computed, and where the two meet. Pure.

    0 ──computed──▶ num_computed   first_block ◀──coming── placed_block ◀──in pages── end_block

What is loaded grows from the end of the region towards its front, so that computing can go on ahead of it: up to
`first_block`, which moves either way as the load proves faster or slower than was thought. When computing has come to
`first_block` and the pages from there on are filled, the request goes on from `end_block`.

A request may have several regions, in token order: what memory holds is loaded at once, what is farther away follows.

All of this may be called while a step executes. The engine computes up to `num_scheduled_tokens`, which no region may
reach below, reads blocks before those, and knows the request's pages from its row; nothing of that changes here.
"""

from kvstore.blocks import BLOCK_SIZE_TOKENS
from workers.request import LoadRegion, Request


def open_region(request: Request, *, first_block: int, end_block: int) -> LoadRegion | None:
    """Claims what of these blocks is neither computed nor claimed already; None if that is nothing.

    The last token is never loaded: its logits are what is wanted.
    """
    first_block = max(first_block, _front(request))
    if request.loads:
        first_block = max(first_block, request.loads[-1].end_block)
    end_block = min(end_block, (request.num_tokens - 1) // BLOCK_SIZE_TOKENS)
    if first_block >= end_block:
        return None
    region = LoadRegion(
        first_block=first_block, end_block=end_block, placed_block=end_block, first_lossy_block=end_block
    )
    request.loads.append(region)
    return region


def move_region(request: Request, region: LoadRegion, first_block: int) -> None:
    """Claims more or less of what is not in pages, as far as that is not computed; a region without blocks goes."""
    position = request.loads.index(region)
    before = request.loads[position - 1].end_block if position else 0
    region.first_block = min(max(first_block, before, _front(request)), region.placed_block)
    if region.first_block == region.end_block:
        del request.loads[position]


def shorten_region(request: Request, region: LoadRegion, end_block: int) -> None:
    """A region of which nothing is in pages ends earlier; one without blocks goes."""
    assert region.placed_block == region.end_block, "blocks at the end of the region are in pages"
    end_block = min(end_block, region.end_block)
    region.first_block = min(region.first_block, end_block)
    region.end_block = region.placed_block = region.first_lossy_block = end_block
    if region.first_block == region.end_block:
        request.loads.remove(region)


def place_blocks(region: LoadRegion, first_block: int, *, is_exact: bool) -> None:
    """Blocks from `first_block` up to those that are placed already are in the request's pages."""
    region.placed_block = max(first_block, region.first_block)
    if not is_exact:
        region.first_lossy_block = region.placed_block


def begin_after(request: Request, first_block: int) -> None:
    """The request starts with so many cached blocks; they need not be loaded."""
    for region in request.loads:
        region.first_block = max(region.first_block, min(first_block, region.end_block))
    request.loads = [region for region in request.loads if region.first_block < region.end_block]


def arrived_region(request: Request) -> LoadRegion | None:
    """The region that the request can jump over now."""
    if not request.loads:
        return None
    region = request.loads[0]
    is_reached = request.num_computed_tokens == region.first_block * BLOCK_SIZE_TOKENS
    return region if is_reached and region.placed_block == region.first_block else None


def num_loaded_tokens(request: Request) -> int:
    """Tokens that are, or will be, loaded and not computed."""
    return sum(region.end_block - region.first_block for region in request.loads) * BLOCK_SIZE_TOKENS


def num_prompt_tokens_left(request: Request) -> int:
    """To be computed before the request decodes; the last one alone is a decode."""
    num_left = request.num_tokens - request.num_computed_tokens - num_loaded_tokens(request)
    return num_left if num_left > 1 else 0


def _front(request: Request) -> int:
    """The first block that nothing has computed, nor will have when the step that executes has ended."""
    return -(-max(request.num_computed_tokens, request.num_scheduled_tokens) // BLOCK_SIZE_TOKENS)
