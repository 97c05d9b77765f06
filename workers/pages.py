"""Device memory as pages: who uses which, which hold cached blocks nobody uses, which to give away next."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from kvstore.blocks import BLOCK_SIZE_TOKENS, BlockKey
from kvstore.prefix_index import PrefixIndex
from workers.request import PageId


def num_pages_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE_TOKENS)


class PagePool:
    """Every page is either used (reference count > 0), free, or idle: unused, but holding a cached block.

    A used page may hold a cached block as well: that is how requests share a prefix. A page is shared only
    when it is full, and full pages are never written, so there is no copy-on-write.
    Idle pages are taken in least-recently-used order. Pages are released last block first, so a chain is
    eaten from its leaf and what remains is still a prefix. (Two requests that computed the same block at the
    same time each keep their own page of it; only one is cached, so a leaf can outlive its parent. It is then
    unreachable and leaves with age.)
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool needs at least one page, got {num_pages}")
        self._ref_counts = [0] * num_pages
        self._keys: list[BlockKey | None] = [None] * num_pages
        self._index: PrefixIndex[PageId] = PrefixIndex()
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

    def is_cached(self, page_id: PageId) -> bool:
        return self._keys[page_id] is not None

    def longest_cached_prefix(self, keys: Sequence[BlockKey], max_blocks: int) -> list[PageId]:
        return self._index.longest_prefix(keys, max_blocks)

    def cached_keys(self) -> tuple[BlockKey, ...]:
        return tuple(self._index)

    def take(self, page_ids: Iterable[PageId]) -> None:
        """Makes available pages used, once each. What they held is forgotten."""
        for page_id in page_ids:
            assert self._ref_counts[page_id] == 0, f"page {page_id} is in use"
            key = self._keys[page_id]
            if key is None:
                del self._free[page_id]
            else:
                del self._idle[page_id]
                self._forget(page_id, key)
            self._ref_counts[page_id] = 1

    def share(self, page_ids: Iterable[PageId]) -> None:
        """One more user for pages that hold cached blocks."""
        for page_id in page_ids:
            assert self._keys[page_id] is not None, f"page {page_id} holds no cached block"
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

    def cache(self, page_id: PageId, key: BlockKey) -> None:
        """Says that a used page holds the computed block `key`; no effect if another page does already."""
        assert self._ref_counts[page_id] > 0, f"page {page_id} is not in use"
        if self._keys[page_id] is None and self._index.put(key, page_id):
            self._keys[page_id] = key
            if key in self._removed:
                del self._removed[key]
            else:
                self._stored[key] = None

    def spoil(self, page_ids: Iterable[PageId]) -> None:
        """Says that these pages may have been written to: cached blocks of those that nobody uses are forgotten."""
        for page_id in page_ids:
            key = self._keys[page_id]
            if key is not None and self._ref_counts[page_id] == 0:
                del self._idle[page_id]
                self._forget(page_id, key)
                self._make_available(page_id)

    def take_changes(self) -> tuple[tuple[BlockKey, ...], tuple[BlockKey, ...]]:
        """Keys that became cached, and keys evicted, since the last call; without those that did both."""
        changes = tuple(self._stored), tuple(self._removed)
        self._stored.clear()
        self._removed.clear()
        return changes

    def check(self, users: Counter[PageId]) -> None:
        """Proves the invariants, given how many requests use each page. AssertionError is a bug of ours."""
        for index, ref_count in enumerate(self._ref_counts):
            page_id, key = PageId(index), self._keys[index]
            assert ref_count == users[page_id], (
                f"page {index}: {ref_count} references, {users[page_id]} users"
            )
            assert (page_id in self._free) == (ref_count == 0 and key is None), f"page {index} is lost"
            assert (page_id in self._idle) == (ref_count == 0 and key is not None), f"page {index} is lost"
            assert key is None or self._index.get(key) == page_id, f"page {index} is not indexed"
            assert ref_count < 2 or key is not None, f"page {index} is shared but not a cached block"
        assert len(self._index) == sum(key is not None for key in self._keys), (
            "the index knows more than the pages"
        )

    def _make_available(self, page_id: PageId) -> None:
        if self._keys[page_id] is None:
            # The page used last is taken first: its memory is warm, and untouched memory stays untouched.
            self._free[page_id] = None
            self._free.move_to_end(page_id, last=False)
        else:
            self._idle[page_id] = None

    def _forget(self, page_id: PageId, key: BlockKey) -> None:
        self._index.remove(key)
        self._keys[page_id] = None
        if key in self._stored:
            del self._stored[key]
        else:
            self._removed[key] = None
