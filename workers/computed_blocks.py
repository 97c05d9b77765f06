"""Full blocks of requests: shared through their pages from now on, and noted for the tiers below. Pure."""

from dataclasses import dataclass

from kvstore.blocks import BLOCK_SIZE_TOKENS, child_key
from kvstore.placement import stretches
from kvstore.tiers.tier import BlockRun
from workers.pages import CachedBlock, PagePool
from workers.request import PageId, Request


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputedRun:
    """Full blocks that became cached because they were computed here, or pulled, exactly; and their pages."""

    run: BlockRun
    page_ids: tuple[PageId, ...]


class ComputedBlocks:
    def __init__(self, pages: PagePool) -> None:
        self._pages = pages
        self._runs: list[ComputedRun] = []

    def advance(self, request: Request, num_computed_tokens: int) -> None:
        """Over tokens that were computed, or pulled, since."""
        first_block = request.num_computed_tokens // BLOCK_SIZE_TOKENS
        new = self._cache(request, num_computed_tokens)
        for start, stop in stretches(new):
            self._runs.append(_run_of(request, first_block + start, first_block + stop))

    def skip(self, request: Request, num_computed_tokens: int) -> None:
        """Over tokens that were loaded: the tiers have those."""
        self._cache(request, num_computed_tokens)

    def take_runs(self) -> tuple[ComputedRun, ...]:
        """Those since the last call."""
        runs, self._runs = tuple(self._runs), []
        return runs

    def _cache(self, request: Request, num_computed_tokens: int) -> list[bool]:
        """Blocks that became full can be shared from now on; says which of them are new here, and exact."""
        keys, new = request.block_keys, []
        first_block = request.num_computed_tokens // BLOCK_SIZE_TOKENS
        for block in range(first_block, num_computed_tokens // BLOCK_SIZE_TOKENS):
            start, stop = block * BLOCK_SIZE_TOKENS, (block + 1) * BLOCK_SIZE_TOKENS
            if block == len(keys):
                parent = keys[-1] if keys else request.root
                keys.append(child_key(parent, request.token_range(start, stop)))
            is_exact = request.is_exact_to(stop)
            cached = CachedBlock(keys[block], request.root, is_exact)
            new.append(self._pages.cache(request.page_ids[block], cached) and is_exact)
        request.num_computed_tokens = num_computed_tokens
        request.num_scheduled_tokens = num_computed_tokens
        return new


def _run_of(request: Request, first_block: int, end_block: int) -> ComputedRun:
    run = BlockRun(
        root=request.root,
        parent=request.block_keys[first_block - 1] if first_block else request.root,
        first_position=first_block,
        keys=tuple(request.block_keys[first_block:end_block]),
    )
    return ComputedRun(run=run, page_ids=request.page_ids[first_block:end_block])
