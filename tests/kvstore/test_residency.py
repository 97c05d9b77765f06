"""One book against a plain model of what it must hold, and what must leave first."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.blocks import BlockKey
from kvstore.residency import Residency
from kvstore.tiers.tier import BlockRun

ROOTS = (BlockKey(b"tenant A's root."), BlockKey(b"tenant B's root."))


def key_of(name: str) -> BlockKey:
    return BlockKey(name.encode().ljust(16, b"."))


def run_of(*names: str, root: BlockKey = ROOTS[0], after: str = "", first_position: int = 0) -> BlockRun:
    return BlockRun(
        root=root,
        parent=key_of(after) if after else root,
        first_position=first_position,
        keys=tuple(map(key_of, names)),
    )


def drop(tier: Residency, root: BlockKey | None) -> list[BlockKey]:
    return [key for part in tier.drop_in_parts(root) for key in part]


def keep(tier: Residency, run: BlockRun, *, now_s: float) -> list[BlockKey]:
    """Stores a run whole, and says what left for it."""
    slots, dropped = tier.reserve(len(run.keys), now_s=now_s)
    assert len(slots) == len(run.keys)
    assert all(tier.commit(slots, run=run, now_s=now_s))
    tier.check()
    return dropped


def test_a_chain_is_eaten_from_its_leaf_and_what_remains_is_a_prefix() -> None:
    tier = Residency(4, policy="lru")
    chain = run_of("a", "b", "c", "d")
    keep(tier, chain, now_s=0.0)
    dropped = [keep(tier, run_of(f"x{n}", root=ROOTS[1]), now_s=1.0 + n) for n in range(3)]
    assert dropped == [[key_of("d")], [key_of("c")], [key_of("b")]]
    assert tier.longest_prefix(chain.keys, 4) == [tier.get(key_of("a"))]


def test_chains_are_told_by_the_value_of_their_ends_and_a_shared_beginning_once() -> None:
    tier = Residency(9, policy="lru")
    keep(tier, run_of("system", "one"), now_s=0.0)
    keep(tier, run_of("x", "y", root=ROOTS[1]), now_s=30.0)
    keep(tier, run_of("two", "three", after="system", first_position=1), now_s=60.0)
    keep(tier, run_of("orphan", after="away", first_position=4), now_s=90.0)
    tier.touch([key_of("x"), key_of("y")], now_s=200.0)
    assert list(tier.chains_by_value(now_s=201.0)) == [
        run_of("x", "y", root=ROOTS[1]),
        run_of("orphan", after="away", first_position=4),
        run_of("system", "two", "three"),
        run_of("one", after="system", first_position=1),
    ]


def test_a_shared_beginning_stays_as_long_as_one_of_its_chains() -> None:
    tier = Residency(4, policy="lru")
    keep(tier, run_of("system", "one"), now_s=0.0)
    keep(tier, run_of("two", after="system", first_position=1), now_s=1.0)
    keep(tier, run_of("x"), now_s=2.0)
    assert keep(tier, run_of("y", "z"), now_s=3.0) == [key_of("one"), key_of("two")]
    assert key_of("system") in tier


def test_what_was_used_lately_outlives_what_came_lately() -> None:
    tier = Residency(2, policy="lru")
    keep(tier, run_of("old"), now_s=0.0)
    keep(tier, run_of("new"), now_s=1.0)
    tier.touch([key_of("old"), key_of("unknown")], now_s=2.0)
    assert keep(tier, run_of("x"), now_s=3.0) == [key_of("new")]


def test_within_one_reading_of_the_clock_the_order_is_that_of_the_calls() -> None:
    tier = Residency(3, policy="lru")
    for name in ("a", "b", "c"):
        keep(tier, run_of(name), now_s=5.0)
    tier.touch([key_of("a")], now_s=5.0)
    assert keep(tier, run_of("x", "y"), now_s=5.0) == [key_of("b"), key_of("c")]


def test_pinned_blocks_and_what_they_continue_never_leave() -> None:
    tier = Residency(3, policy="lru")
    chain = run_of("a", "b", "c")
    keep(tier, chain, now_s=0.0)
    pinned = tier.pin(chain.keys[1:2])
    assert tier.reserve(3, now_s=1.0)[1] == [key_of("c")]
    assert tier.reserve(1, now_s=1.0) == ([], [])
    tier.unpin(pinned)
    assert tier.reserve(3, now_s=2.0)[1] == [key_of("b"), key_of("a")]
    tier.check()


def test_pins_are_counted() -> None:
    tier = Residency(1, policy="lru")
    keep(tier, run_of("a"), now_s=0.0)
    twice = tier.pin([key_of("a")]) + tier.pin([key_of("a")])
    tier.unpin(twice[:1])
    assert tier.reserve(1, now_s=1.0) == ([], [])
    tier.unpin(twice[1:])
    assert tier.reserve(1, now_s=1.0) == (twice[:1], [key_of("a")])


def test_reserved_slots_hold_nothing_and_can_be_given_back() -> None:
    tier = Residency(2, policy="lru")
    slots, _ = tier.reserve(2, now_s=0.0)
    assert (len(tier), tier.num_idle, tier.reserve(1, now_s=0.0)) == (0, 0, ([], []))
    tier.free(slots)
    assert tier.num_idle == 2
    tier.check()


def test_nothing_is_committed_to_a_slot_that_is_not_reserved() -> None:
    tier = Residency(2, policy="lru")
    keep(tier, run_of("a"), now_s=0.0)
    taken = tier.get(key_of("a"))
    assert taken is not None
    with pytest.raises(AssertionError, match="not reserved"):
        tier.commit([taken], run=run_of("b"), now_s=1.0)


def test_the_second_of_two_writers_of_a_block_loses_quietly() -> None:
    tier = Residency(2, policy="lru")
    run = run_of("a")
    (first, second), _ = tier.reserve(2, now_s=0.0)
    assert tier.commit([first], run=run, now_s=0.0) == [True]
    assert tier.commit([second], run=run, now_s=0.0) == [False]
    assert tier.get(run.keys[0]) == first
    assert tier.num_idle == 2
    tier.check()


def test_blocks_loaded_from_their_end_become_one_chain() -> None:
    tier = Residency(4, policy="lru")
    keep(tier, run_of("c", "d", after="b", first_position=2), now_s=0.0)
    chain = run_of("a", "b", "c", "d").keys
    assert tier.longest_prefix(chain, 4) == []
    keep(tier, run_of("a", "b"), now_s=1.0)
    assert len(tier.longest_prefix(chain, 4)) == 4
    assert tier.reserve(3, now_s=2.0)[1] == [key_of("d"), key_of("c"), key_of("b")]


def test_one_root_is_dropped_and_others_stay() -> None:
    tier = Residency(4, policy="lru")
    keep(tier, run_of("a", "b"), now_s=0.0)
    keep(tier, run_of("c", "d", root=ROOTS[1]), now_s=0.0)
    assert set(drop(tier, ROOTS[0])) == {key_of("a"), key_of("b")}
    tier.check()
    assert set(tier) == {key_of("c"), key_of("d")}
    assert len(drop(tier, None)) == 2
    assert len(tier.reserve(4, now_s=1.0)[0]) == 4


def test_a_dropped_block_is_gone_at_once_and_its_slot_when_it_is_unpinned() -> None:
    tier = Residency(1, policy="lru")
    keep(tier, run_of("a"), now_s=0.0)
    pinned = tier.pin([key_of("a")])
    assert drop(tier, None) == [key_of("a")]
    assert key_of("a") not in tier
    assert tier.reserve(1, now_s=1.0) == ([], [])
    tier.check()
    tier.unpin(pinned)
    assert keep(tier, run_of("a"), now_s=2.0) == []


def test_a_removed_block_cuts_its_chain_and_can_come_back() -> None:
    tier = Residency(4, policy="lru")
    chain = run_of("a", "b", "c")
    keep(tier, chain, now_s=0.0)
    assert tier.remove([key_of("b"), key_of("unknown")]) == [key_of("b")]
    tier.check()
    assert len(tier.longest_prefix(chain.keys, 3)) == 1
    keep(tier, run_of("b", after="a", first_position=1), now_s=1.0)
    assert len(tier.longest_prefix(chain.keys, 3)) == 3


def test_a_peer_that_lies_about_a_root_breaks_nothing() -> None:
    tier = Residency(3, policy="lru")
    keep(tier, run_of("a"), now_s=0.0)
    keep(tier, run_of("b", after="a", first_position=1, root=ROOTS[1]), now_s=0.0)
    assert drop(tier, ROOTS[0]) == [key_of("a")]
    tier.check()
    assert tier.reserve(3, now_s=1.0)[1] == [key_of("b")]


@pytest.mark.parametrize(
    "lies",
    [
        [run_of("a", after="a", first_position=1)],
        [run_of("a", after="b", first_position=5), run_of("b", after="a", first_position=5)],
        [run_of("a", after="b", first_position=1), run_of("b", after="a", first_position=2)],
        [run_of("c", "a", after="b", first_position=3), run_of("a", "b", "c")],
        [run_of("a", after="b", first_position=6), run_of("a", "b", after="z", first_position=4)],
    ],
)
def test_a_peer_that_lies_about_what_continues_what_makes_no_block_stay_for_ever(
    lies: list[BlockRun],
) -> None:
    tier = Residency(4, policy="lru")
    for run in lies:
        slots, _ = tier.reserve(len(run.keys), now_s=0.0)
        tier.commit(slots, run=run, now_s=0.0)
        tier.check()
    assert len(tier.reserve(4, now_s=1.0)[0]) == 4


@pytest.mark.parametrize("first_position", [3, 4])
def test_a_run_that_claims_to_continue_its_own_end_can_leave_whatever_its_slots_held_before(
    first_position: int,
) -> None:
    tier = Residency(2, policy="lru")
    keep(tier, run_of("x", "y", after="away", first_position=2), now_s=0.0)
    tier.remove(run_of("x", "y").keys)
    keep(tier, run_of("a", "b", after="b", first_position=first_position), now_s=1.0)
    assert len(keep(tier, run_of("new", "er"), now_s=2.0)) == 2


def test_what_comes_with_blocks_that_are_held_already_continues_those() -> None:
    tier = Residency(6, policy="lru")
    chain = run_of("a", "b", "c", "d", "e")
    keep(tier, run_of("a", "b"), now_s=0.0)
    keep(tier, run_of("d", after="c", first_position=3), now_s=0.0)
    tier.remove([key_of("a")])
    slots, _ = tier.reserve(4, now_s=1.0)
    assert tier.commit(slots, run=chain.part(0, 4), now_s=1.0) == [True, False, True, False]
    tier.check()
    slots, _ = tier.reserve(2, now_s=2.0)
    assert tier.commit(slots, run=chain.part(3, 5), now_s=2.0) == [False, True]
    tier.check()
    assert tier.run(chain.keys) == chain


def test_a_block_that_comes_back_was_of_use_to_nobody_yet() -> None:
    tier = Residency(1, policy="lru")
    keep(tier, run_of("a"), now_s=0.0)
    tier.touch([key_of("a")], now_s=1.0)
    tier.remove([key_of("a")])
    keep(tier, run_of("a"), now_s=2.0)
    assert [prefix.num_hits for prefix in tier.prefixes(1, now_s=3.0)] == [0]


def test_a_run_that_names_a_block_twice_holds_it_once() -> None:
    tier = Residency(3, policy="lru")
    slots, _ = tier.reserve(3, now_s=0.0)
    assert tier.commit(slots, run=run_of("a", "b", "a"), now_s=0.0) == [True, True, False]
    tier.check()
    assert len(tier) == 2
    assert len(tier.reserve(3, now_s=1.0)[0]) == 3


def test_a_run_goes_as_far_as_blocks_continue_each_other() -> None:
    tier = Residency(8, policy="lru")
    keep(tier, run_of("a", "b", "c"), now_s=0.0)
    keep(tier, run_of("x", "y", root=ROOTS[1]), now_s=0.0)
    for names in (("a", "b", "y"), ("a", "b", "a"), ("a", "b", "unheard")):
        assert tier.run(tuple(map(key_of, names))) == run_of("a", "b")


def test_a_run_is_placed_from_its_first_key() -> None:
    tier = Residency(4, policy="lru")
    chain = run_of("a", "b", "c")
    keep(tier, chain, now_s=0.0)
    keep(tier, run_of("z", after="y", first_position=9), now_s=0.0)
    assert tier.run(chain.keys) == chain
    assert tier.run(chain.keys[1:]) == chain.part(1, 3)
    assert tier.run([key_of("z")]) == run_of("z", after="y", first_position=9)


def test_prefixes_are_where_chains_end_or_part_longest_held_first() -> None:
    tier = Residency(8, policy="lru")
    keep(tier, run_of("system", "one"), now_s=0.0)
    keep(tier, run_of("two", "three", after="system", first_position=1), now_s=10.0)
    tier.touch([key_of("system")], now_s=30.0)
    found = tier.prefixes(8, now_s=40.0)
    assert [(p.last_key, p.num_blocks, p.num_hits) for p in found] == [
        (key_of("system"), 1, 1),
        (key_of("one"), 2, 0),
        (key_of("three"), 3, 0),
    ]
    assert [round(p.age_s) for p in found] == [40, 40, 30]
    assert round(found[0].idle_s) == 10
    assert len(tier.prefixes(1, now_s=40.0)) == 1


@pytest.mark.parametrize(("num_slots", "policy", "named"), [(0, "lru", "got 0"), (1, "fifo", "got 'fifo'")])
def test_a_tier_that_cannot_be_is_refused_by_name(num_slots: int, policy: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Residency(num_slots, policy=policy)


class Books(RuleBasedStateMachine):
    """Random traffic of chains over a small alphabet, so that they share beginnings."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = Residency(6, policy="cost", block_size_tokens=4096)
        self.now_s = 0.0
        self.reserved: list[int] = []
        self.pinned: list[list[int]] = []
        self.held: dict[int, BlockKey] = {}

    def chain(self, name: str, root: BlockKey) -> BlockRun:
        prefix = root[:8].decode()
        return run_of(*(prefix + name[: n + 1] for n in range(len(name))), root=root)

    def parent_of(self, key: BlockKey) -> BlockKey:
        """Names are a root's beginning and a letter for each block."""
        return key_of(key.rstrip(b".").decode()[:-1])

    def left(self, keys: list[BlockKey]) -> None:
        gone = {slot for slot, key in self.held.items() if key in keys}
        assert len(gone) == len(keys)
        for slot in gone:
            del self.held[slot]

    @rule(num_slots=st.integers(0, 4), later_s=st.floats(0, 100))
    def reserve(self, num_slots: int, later_s: float) -> None:
        self.now_s += later_s
        pinned = {slot for slots in self.pinned for slot in slots}
        slots, dropped = self.tier.reserve(num_slots, now_s=self.now_s)
        assert not {self.held[slot] for slot in pinned if slot in self.held} & set(dropped)
        for position, key in enumerate(dropped):
            later = {*self.held.values()} - {*dropped[:position]}
            assert not {child for child in later if self.parent_of(child) == key}, "a leaf had to go first"
        self.left(dropped)
        assert len(slots) <= num_slots
        self.reserved += slots

    @precondition(lambda self: self.reserved)
    @rule(name=st.text("ab", min_size=1, max_size=4), root=st.sampled_from(ROOTS), data=st.data())
    def commit(self, name: str, root: BlockKey, data: st.DataObject) -> None:
        run = self.chain(name, root)
        self.put(run.part(data.draw(st.integers(0, len(name) - 1)), len(name)))

    @rule(name=st.text("ab", min_size=1, max_size=4), root=st.sampled_from(ROOTS))
    def keep(self, name: str, root: BlockKey) -> None:
        """A chain from its beginning, which is often held."""
        slots, dropped = self.tier.reserve(len(name), now_s=self.now_s)
        self.left(dropped)
        self.reserved += slots
        if self.reserved:
            self.put(self.chain(name, root))

    def put(self, run: BlockRun) -> None:
        part = run.part(0, min(len(run.keys), len(self.reserved)))
        slots = [self.reserved.pop() for _ in part.keys]
        is_new = self.tier.commit(slots, run=part, now_s=self.now_s)
        for slot, key, is_held in zip(slots, part.keys, is_new, strict=True):
            assert is_held == (key not in self.held.values())
            if is_held:
                self.held[slot] = key

    @precondition(lambda self: self.reserved)
    @rule()
    def free(self) -> None:
        self.tier.free([self.reserved.pop()])

    @rule(name=st.text("ab", min_size=1, max_size=4), root=st.sampled_from(ROOTS))
    def pin(self, name: str, root: BlockKey) -> None:
        keys = self.chain(name, root).keys
        slots = self.tier.pin(keys)
        assert [self.held[slot] for slot in slots] == list(keys[: len(slots)])
        assert len(slots) == len(keys) or keys[len(slots)] not in self.held.values()
        self.tier.touch(keys[: len(slots)], now_s=self.now_s)
        self.pinned.append(slots)

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        self.tier.unpin(self.pinned.pop())

    @rule(root=st.sampled_from((None, *ROOTS)))
    def drop(self, root: BlockKey | None) -> None:
        dropped = drop(self.tier, root)
        if root is None:
            assert set(dropped) == set(self.held.values())
        self.left(dropped)

    @rule(name=st.text("ab", min_size=1, max_size=4), root=st.sampled_from(ROOTS))
    def remove(self, name: str, root: BlockKey) -> None:
        key = self.chain(name, root).keys[-1]
        removed = self.tier.remove([key])
        assert removed == [key] * (key in self.held.values())
        self.left(removed)

    @invariant()
    def nothing_is_lost_and_the_capacity_is_kept(self) -> None:
        self.tier.check()
        assert {key: self.tier.get(key) for key in self.tier} == {k: s for s, k in self.held.items()}
        pins = Counter(slot for slots in self.pinned for slot in slots)
        assert len(pins.keys() | self.held.keys() | set(self.reserved)) <= self.tier.num_slots
        assert self.tier.num_idle == self.tier.num_slots - len(self.reserved) - len(pins)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
