from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.blocks import BlockKey
from workers.pages import CachedBlock, PagePool, num_pages_for
from workers.request import PageId


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "little"))


def block(number: int, *, root: int = 0, is_exact: bool = True) -> CachedBlock:
    return CachedBlock(key(number), key(1000 + root), is_exact)


def take(pool: PagePool, num_pages: int) -> list[PageId]:
    page_ids = [page_id for page_id, _ in zip(pool.available_in_order(), range(num_pages), strict=False)]
    pool.take(page_ids)
    return page_ids


def cached_chain(pool: PagePool, numbers: list[int]) -> list[PageId]:
    page_ids = take(pool, len(numbers))
    for page_id, number in zip(page_ids, numbers, strict=True):
        pool.cache(page_id, block(number))
    return page_ids


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_a_partly_filled_block_needs_a_page_too(num_tokens: int, num_pages: int) -> None:
    assert num_pages_for(num_tokens) == num_pages


def test_free_pages_are_taken_before_idle_ones() -> None:
    pool = PagePool(3)
    idle = cached_chain(pool, [1])
    pool.release(idle)
    assert take(pool, 3)[-1] == idle[0]


def test_a_chain_is_evicted_from_its_leaf() -> None:
    pool = PagePool(3)
    chain = cached_chain(pool, [1, 2, 3])
    pool.release(chain)
    for num_left in (2, 1, 0):
        take(pool, 1)
        assert pool.longest_cached_prefix([key(1), key(2), key(3)], 3) == chain[:num_left]


def test_the_chain_used_longest_ago_is_evicted_first() -> None:
    pool = PagePool(4)
    old, young = cached_chain(pool, [1, 2]), cached_chain(pool, [3, 4])
    pool.release(old)
    pool.release(young)
    pool.share(old)  # used again
    pool.release(old)
    take(pool, 2)
    assert pool.longest_cached_prefix([key(1), key(2)], 2) == old
    assert pool.longest_cached_prefix([key(3), key(4)], 2) == []


def test_a_shared_page_is_available_only_after_its_last_user() -> None:
    pool = PagePool(1)
    chain = cached_chain(pool, [1])
    pool.share(chain)
    pool.release(chain)
    assert pool.num_available == 0
    pool.release(chain)
    assert pool.num_available == 1


def test_a_block_computed_twice_is_cached_once() -> None:
    pool = PagePool(2)
    first, second = cached_chain(pool, [1]), cached_chain(pool, [1])
    assert pool.longest_cached_prefix([key(1)], 1) == first
    assert not pool.is_cached(second[0])
    pool.release(second)
    pool.release(first)
    pool.check(Counter())


def test_changes_name_what_is_new_and_what_is_gone_since_the_last_call() -> None:
    pool = PagePool(2)
    pool.release(cached_chain(pool, [1, 2]))
    assert pool.take_changes() == ((key(1), key(2)), ())
    pool.release(cached_chain(pool, [3]))  # evicts 2
    assert pool.take_changes() == ((key(3),), (key(2),))
    assert pool.take_changes() == ((), ())


def test_what_came_and_went_between_two_calls_is_no_change() -> None:
    pool = PagePool(1)
    pool.release(cached_chain(pool, [1]))
    pool.take_changes()
    pool.release(cached_chain(pool, [2]))
    pool.release(cached_chain(pool, [1]))
    assert pool.take_changes() == ((), ())


def test_a_pinned_page_is_neither_given_away_nor_forgotten_when_its_user_goes() -> None:
    pool = PagePool(2)
    chain = cached_chain(pool, [1])
    pool.pin(chain)
    pool.pin(chain)
    pool.release(chain)
    pool.unpin(chain)
    assert (pool.num_available, pool.num_pinned) == (1, 1)
    assert pool.longest_cached_prefix([key(1)], 1) == chain
    pool.unpin(chain)
    assert (pool.num_available, pool.num_pinned) == (2, 0)
    pool.check(Counter())


def test_an_unused_page_that_holds_a_block_can_be_pinned() -> None:
    pool = PagePool(1)
    chain = cached_chain(pool, [1])
    pool.release(chain)
    pool.pin(chain)
    assert pool.num_available == 0
    pool.check(Counter())
    pool.unpin(chain)
    assert pool.num_available == 1


def test_an_inexact_block_is_shared_but_not_announced() -> None:
    pool = PagePool(2)
    page_ids = take(pool, 2)
    assert pool.cache(page_ids[0], block(1))
    assert pool.cache(page_ids[1], block(2, is_exact=False))
    assert pool.longest_cached_prefix([key(1), key(2)], 2) == page_ids
    assert pool.num_exact(page_ids) == 1
    assert pool.take_changes() == ((key(1),), ())
    assert pool.cached_keys() == (key(1),)
    pool.release(page_ids)
    take(pool, 2)
    assert pool.take_changes() == ((), (key(1),))


def test_an_exact_block_takes_the_place_of_an_inexact_one() -> None:
    pool = PagePool(2)
    inexact, exact = take(pool, 1), take(pool, 1)
    pool.cache(inexact[0], block(1, is_exact=False))
    assert pool.cache(exact[0], block(1))
    assert pool.longest_cached_prefix([key(1)], 1) == exact
    assert not pool.is_cached(inexact[0])
    assert pool.take_changes() == ((key(1),), ())
    pool.check(Counter([*inexact, *exact]))


def test_an_inexact_block_that_requests_share_stays() -> None:
    pool = PagePool(2)
    inexact, exact = take(pool, 1), take(pool, 1)
    pool.cache(inexact[0], block(1, is_exact=False))
    pool.share(inexact)
    assert not pool.cache(exact[0], block(1))
    assert pool.longest_cached_prefix([key(1)], 1) == inexact
    pool.check(Counter([*inexact, *inexact, *exact]))


def test_what_is_dropped_is_of_one_root_and_unused() -> None:
    pool = PagePool(4)
    unused, used, pinned, other = (take(pool, 1) for _ in range(4))
    for number, page_ids in enumerate((unused, used, pinned)):
        pool.cache(page_ids[0], block(number))
    pool.cache(other[0], block(3, root=1))
    pool.pin(pinned)
    for page_ids in (unused, pinned, other):
        pool.release(page_ids)
    assert pool.drop(key(1000)) == 1
    assert set(pool.cached_keys()) == {key(1), key(2), key(3)}
    assert pool.drop(None) == 1
    assert set(pool.cached_keys()) == {key(1), key(2)}
    pool.check(Counter(used))


@pytest.mark.parametrize(
    "misuse",
    [
        lambda pool, used, unused: pool.take(used),
        lambda pool, used, unused: pool.release(unused),
        lambda pool, used, unused: pool.share(used),
        lambda pool, used, unused: pool.cache(unused[0], block(1)),
        lambda pool, used, unused: pool.pin(unused),
        lambda pool, used, unused: pool.unpin(used),
    ],
)
def test_misuse_of_a_page_is_a_bug_that_shows(
    misuse: Callable[[PagePool, list[PageId], list[PageId]], None],
) -> None:
    pool = PagePool(2)
    used, unused = take(pool, 1), [next(pool.available_in_order())]
    with pytest.raises(AssertionError, match="page"):
        misuse(pool, used, unused)


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0"):
        PagePool(0)


class PoolMachine(RuleBasedStateMachine):
    """Users come and go; the directory follows the changes. No page is lost, none is owned twice."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6)
        self.users: list[list[PageId]] = []
        self.pins: list[list[PageId]] = []
        self.directory: set[BlockKey] = set()

    @rule(num_new=st.integers(0, 3), keys=st.lists(st.integers(0, 7), max_size=4, unique=True))
    def come(self, num_new: int, keys: list[int]) -> None:
        shared = self.pool.longest_cached_prefix([key(k) for k in keys], 4)
        self.pool.share(shared)
        self.users.append([*shared, *take(self.pool, min(num_new, self.pool.num_available))])

    @precondition(lambda self: self.users)
    @rule(data=st.data(), number=st.integers(0, 7), is_exact=st.booleans())
    def compute(self, data: st.DataObject, number: int, is_exact: bool) -> None:
        user = data.draw(st.sampled_from(self.users))
        if user:
            self.pool.cache(user[-1], block(number, is_exact=is_exact))

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        user = self.users.pop(data.draw(st.integers(0, len(self.users) - 1)))
        self.pool.release(user)

    @rule(keys=st.lists(st.integers(0, 7), max_size=4, unique=True))
    def pin(self, keys: list[int]) -> None:
        self.pins.append(self.pool.longest_cached_prefix([key(k) for k in keys], 4))
        self.pool.pin(self.pins[-1])

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.pool.unpin(self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1))))

    @rule()
    def drop(self) -> None:
        self.pool.drop(None)

    @rule()
    def report(self) -> None:
        stored, removed = self.pool.take_changes()
        assert self.directory.isdisjoint(stored)
        assert self.directory.issuperset(removed)
        self.directory = (self.directory | set(stored)) - set(removed)
        assert self.directory == set(self.pool.cached_keys())

    @invariant()
    def holds(self) -> None:
        self.pool.check(Counter(page_id for user in self.users for page_id in user))
        available = list(self.pool.available_in_order())
        assert len(available) == len(set(available)) == self.pool.num_available


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_no_page_is_lost_and_none_is_owned_twice = PoolMachine.TestCase
