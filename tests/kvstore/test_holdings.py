"""Whatever happens, whoever applies the changes in order knows what is held, and where."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.blocks import BlockKey
from kvstore.holdings import HoldingChanges, Holdings
from kvstore.tiers.tier import Tier

KEYS = [BlockKey(bytes([number]) * 16) for number in range(6)]
A, B, C = KEYS[:3]
TIERS = st.sampled_from((Tier.DEVICE, Tier.MEMORY, Tier.DISK))


def heard(holdings: Holdings) -> Holdings:
    """The same, with the first snapshot taken."""
    holdings.take_changes(1000)
    return holdings


def test_the_first_changes_are_a_snapshot() -> None:
    holdings = Holdings()
    holdings.note(Tier.DISK, stored=[A, B])
    assert holdings.take_changes(10) == HoldingChanges(
        snapshot=True, stored=(A, B), tiers=(Tier.DISK, Tier.DISK)
    )
    assert holdings.take_changes(10) == HoldingChanges()


def test_a_block_is_announced_with_its_fastest_tier_and_only_when_that_changes() -> None:
    holdings = heard(Holdings())
    holdings.note(Tier.DEVICE, stored=[A])
    holdings.note(Tier.MEMORY, stored=[A])
    assert holdings.take_changes(10) == HoldingChanges(stored=(A,), tiers=(Tier.DEVICE,))
    holdings.note(Tier.DISK, stored=[A])
    assert holdings.take_changes(10) == HoldingChanges()
    holdings.note(Tier.DEVICE, removed=[A])
    assert holdings.tier(A) is Tier.MEMORY
    assert holdings.take_changes(10) == HoldingChanges(stored=(A,), tiers=(Tier.MEMORY,))
    holdings.note(Tier.MEMORY, removed=[A])
    holdings.note(Tier.DISK, removed=[A])
    assert holdings.take_changes(10) == HoldingChanges(removed=(A,))
    assert holdings.tier(A) is None


def test_what_came_and_went_unheard_is_no_news() -> None:
    holdings = heard(Holdings())
    holdings.note(Tier.MEMORY, stored=[A])
    holdings.note(Tier.MEMORY, removed=[A])
    assert holdings.take_changes(10) == HoldingChanges()


def test_a_snapshot_comes_in_portions_of_which_only_the_first_says_so() -> None:
    holdings = heard(Holdings())
    holdings.note(Tier.MEMORY, stored=KEYS)
    holdings.take_changes(10)
    holdings.restart()
    first = holdings.take_changes(4)
    holdings.note(Tier.MEMORY, removed=[KEYS[0], KEYS[5]])
    second = holdings.take_changes(4)
    assert (first.snapshot, first.stored) == (True, tuple(KEYS[:4]))
    assert second == HoldingChanges(stored=(KEYS[4],), tiers=(Tier.MEMORY,), removed=(KEYS[0],))
    assert holdings.take_changes(4) == HoldingChanges()


def test_what_comes_and_goes_while_nobody_listens_does_not_pile_up() -> None:
    holdings = heard(Holdings())
    holdings.note(Tier.MEMORY, stored=[A, B])
    holdings.take_changes(10)
    holdings.note(Tier.MEMORY, removed=[A])
    for key in KEYS[2:]:
        holdings.note(Tier.MEMORY, stored=[key])
        holdings.note(Tier.MEMORY, removed=[key])
    assert holdings.num_pending == 1
    assert holdings.take_changes(1) == HoldingChanges(removed=(A,))


class Directory(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.holdings = Holdings()
        self.held: dict[Tier, set[BlockKey]] = {tier: set() for tier in (Tier.DEVICE, Tier.MEMORY, Tier.DISK)}
        self.known: dict[BlockKey, Tier] = {}

    @rule(tier=TIERS, keys=st.sets(st.sampled_from(KEYS)))
    def store(self, tier: Tier, keys: set[BlockKey]) -> None:
        self.held[tier] |= keys
        self.holdings.note(tier, stored=sorted(keys))

    @rule(tier=TIERS, keys=st.sets(st.sampled_from(KEYS)))
    def remove(self, tier: Tier, keys: set[BlockKey]) -> None:
        self.held[tier] -= keys
        self.holdings.note(tier, removed=sorted(keys))

    @rule()
    def restart(self) -> None:
        self.holdings.restart()

    @rule(max_keys=st.integers(1, 4))
    def hear(self, max_keys: int) -> None:
        changes = self.holdings.take_changes(max_keys)
        assert len(changes.stored) + len(changes.removed) <= max_keys
        if changes.snapshot:
            self.known = {}
        self.known.update(zip(changes.stored, changes.tiers, strict=True))
        for key in changes.removed:
            del self.known[key]

    @rule()
    def hear_all(self) -> None:
        for _ in range(2 * len(KEYS) + 2):
            self.hear(2)
        fastest = {key: tier for tier in reversed(Tier) for key in self.held.get(tier, ())}
        assert self.known == fastest

    @invariant()
    def nothing_unheard_is_forgotten(self) -> None:
        self.holdings.check()


TestDirectory = Directory.TestCase
TestDirectory.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
