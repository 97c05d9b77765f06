"""Device memory as pages: who uses which, which hold cached blocks nobody uses, which to give away next."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvstore.blocks import BLOCK_SIZE_TOKENS, BlockKey
from kvstore.prefix_index import PrefixIndex
from workers.request import PageId


def num_pages_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE_TOKENS)


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """What a page holds. Inexact: decoded from a lossy level, or computed on top of such a block."""

    key: BlockKey
    root: BlockKey  # of its chain: model, adapter and tenant
    is_exact: bool


class PagePool:
    """Every page is either used (reference count > 0), free, or idle: unused, but holding a cached block.

    A used page may hold a cached block as well: that is how requests share a prefix. A page is shared only
    when it is full, and full pages are never written, so there is no copy-on-write.
    Idle pages are taken in least-recently-used order. Pages are released last block first, so a chain is
    eaten from its leaf and what remains is still a prefix. (Two requests that computed the same block at the
    same time each keep their own page of it; only one is cached, so a leaf can outlive its parent. It is then
    unreachable and leaves with age.)
    A pinned page is used by nobody but by who copies it: it is neither given away nor forgotten meanwhile.
    Inexact blocks are shared as others are, but not told to anybody: equal keys mean equal KV.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool needs at least one page, got {num_pages}")
        self._ref_counts = [0] * num_pages
        self._pins: Counter[PageId] = Counter()
        self._blocks: list[CachedBlock | None] = [None] * num_pages
        self._index: PrefixIndex[PageId] = PrefixIndex()
        self._inexact: set[BlockKey] = set()  # those of the index that are
        # OrderedDict, not dict: taking from the front of a dict again and again walks over its dead entries.
        self._free: OrderedDict[PageId, None] = OrderedDict((PageId(i), None) for i in range(num_pages))
        self._idle: OrderedDict[PageId, None] = OrderedDict()
        self._stored: dict[BlockKey, None] = {}
        self._removed: dict[BlockKey, None] = {}

    @property
    def num_pages(self) -> int:
        return len(self._ref_counts)

    @property
    def num_available(self) -> int:
        """Pages that can be taken now: free and idle ones."""
        return len(self._free) + len(self._idle)

    def available_in_order(self) -> Iterator[PageId]:
        """The pages that can be taken, first choice first. The iterator is void once the pool changes."""
        yield from self._free
        yield from self._idle

    def ref_count(self, page_id: PageId) -> int:
        return self._ref_counts[page_id]

    @property
    def num_cached(self) -> int:
        """Pages that hold a cached block, used or idle."""
        return len(self._index)

    @property
    def num_pinned(self) -> int:
        return len(self._pins)

    def is_cached(self, page_id: PageId) -> bool:
        return self._blocks[page_id] is not None

    def num_exact(self, page_ids: Sequence[PageId]) -> int:
        """How many of these cached pages, from the first on, hold exact blocks."""
        for position, page_id in enumerate(page_ids):
            block = self._blocks[page_id]
            assert block is not None, f"page {page_id} holds no cached block"
            if not block.is_exact:
                return position
        return len(page_ids)

    def longest_cached_prefix(self, keys: Sequence[BlockKey], max_blocks: int) -> list[PageId]:
        return self._index.longest_prefix(keys, max_blocks)

    def cached_keys(self) -> tuple[BlockKey, ...]:
        """Of the exact blocks, oldest first."""
        return tuple(key for key in self._index if key not in self._inexact)

    def take(self, page_ids: Iterable[PageId]) -> None:
        """Makes available pages used, once each. What they held is forgotten."""
        for page_id in page_ids:
            assert self._ref_counts[page_id] == 0, f"page {page_id} is in use"
            block = self._blocks[page_id]
            if block is None:
                del self._free[page_id]
            else:
                del self._idle[page_id]
                self._forget(page_id, block)
            self._ref_counts[page_id] = 1

    def share(self, page_ids: Iterable[PageId]) -> None:
        """One more user for pages that hold cached blocks."""
        for page_id in page_ids:
            assert self._blocks[page_id] is not None, f"page {page_id} holds no cached block"
            if self._ref_counts[page_id] == 0:
                del self._idle[page_id]
            self._ref_counts[page_id] += 1

    def release(self, page_ids: Sequence[PageId]) -> None:
        """One user less for the pages of a request, given in token order."""
        for page_id in reversed(page_ids):
            assert self._ref_counts[page_id] > 0, f"page {page_id} is not in use"
            self._ref_counts[page_id] -= 1
            if self._ref_counts[page_id] == 0:
                self._make_available(page_id)

    def pin(self, page_ids: Iterable[PageId]) -> None:
        """One more reference to pages that are used or hold cached blocks, for as long as a thread copies them."""
        for page_id in page_ids:
            if self._ref_counts[page_id] == 0:
                assert self._blocks[page_id] is not None, f"page {page_id} holds nothing to copy"
                del self._idle[page_id]
            self._ref_counts[page_id] += 1
            self._pins[page_id] += 1

    def unpin(self, page_ids: Sequence[PageId]) -> None:
        """Takes back one `pin` of these pages, given in token order."""
        for page_id in page_ids:
            assert self._pins[page_id] > 0, f"page {page_id} is not pinned"
            self._pins[page_id] -= 1
            if self._pins[page_id] == 0:
                del self._pins[page_id]
        self.release(page_ids)

    def cache(self, page_id: PageId, block: CachedBlock) -> bool:
        """Says that a used page holds this computed block; False, and no effect, if another page does already.

        An exact block takes the place of an inexact one, unless several requests share that.
        """
        assert self._ref_counts[page_id] > 0, f"page {page_id} is not in use"
        if self._blocks[page_id] is not None:
            return False
        twin = self._index.get(block.key)
        if twin is not None:
            known = self._blocks[twin]
            assert known is not None, f"page {twin} is indexed and empty"
            if known.is_exact or not block.is_exact or self._ref_counts[twin] > 1:
                return False
            self._uncache(twin, known)
        self._index.put(block.key, page_id)
        self._blocks[page_id] = block
        if not block.is_exact:
            self._inexact.add(block.key)
            return True
        if block.key in self._removed:
            del self._removed[block.key]
        else:
            self._stored[block.key] = None
        return True

    def drop(self, root: BlockKey | None) -> int:
        """Forgets the blocks of a chain root (None: of all) that nobody uses, and says how many they were."""
        dropped = [
            (page_id, block)
            for page_id in self._idle
            if (block := self._blocks[page_id]) is not None and root in (None, block.root)
        ]
        for page_id, block in dropped:
            self._uncache(page_id, block)
        return len(dropped)

    def take_changes(self) -> tuple[tuple[BlockKey, ...], tuple[BlockKey, ...]]:
        """Keys that became cached, and keys evicted, since the last call; without those that did both."""
        changes = tuple(self._stored), tuple(self._removed)
        self._stored.clear()
        self._removed.clear()
        return changes

    def check(self, users: Counter[PageId]) -> None:
        """Proves the invariants, given how many requests use each page. AssertionError is a bug of ours."""
        for index, ref_count in enumerate(self._ref_counts):
            page_id, block = PageId(index), self._blocks[index]
            num_users, num_pins = users[page_id], self._pins.get(page_id, 0)
            assert ref_count == num_users + num_pins, (
                f"page {index}: {ref_count} references, {num_users} users and {num_pins} pins"
            )
            assert (page_id in self._free) == (ref_count == 0 and block is None), f"page {index} is lost"
            assert (page_id in self._idle) == (ref_count == 0 and block is not None), f"page {index} is lost"
            assert block is None or self._index.get(block.key) == page_id, f"page {index} is not indexed"
            assert num_users < 2 or block is not None, f"page {index} is shared but not a cached block"
        assert len(self._index) == sum(block is not None for block in self._blocks), (
            "the index knows more than the pages"
        )
        inexact = {block.key for block in self._blocks if block is not None and not block.is_exact}
        assert self._inexact == inexact, "an inexact block would be announced"

    def _make_available(self, page_id: PageId) -> None:
        if self._blocks[page_id] is None:
            # The page used last is taken first: its memory is warm, and untouched memory stays untouched.
            self._free[page_id] = None
            self._free.move_to_end(page_id, last=False)
        else:
            self._idle[page_id] = None

    def _uncache(self, page_id: PageId, block: CachedBlock) -> None:
        if self._ref_counts[page_id] == 0:
            del self._idle[page_id]
        self._forget(page_id, block)
        if self._ref_counts[page_id] == 0:
            self._make_available(page_id)

    def _forget(self, page_id: PageId, block: CachedBlock) -> None:
        self._index.remove(block.key)
        self._blocks[page_id] = None
        if not block.is_exact:
            self._inexact.remove(block.key)
            return
        if block.key in self._stored:
            del self._stored[block.key]
        else:
            self._removed[block.key] = None
