from kvstore.eviction import EvictionOrder
from kvstore.placement import ATTENTION_EQUALS_LINEAR_TOKENS, POLICIES


def order(policy: str, *first_tokens: int) -> EvictionOrder:
    """Blocks in slots 0, 1, ... last used at 0, 1, ... s."""
    evictions = EvictionOrder(len(first_tokens), policy=POLICIES[policy], block_size_tokens=16)
    for slot, first_token in enumerate(first_tokens):
        evictions.place([slot], first_position=first_token // 16, at_s=float(slot))
        evictions.queue(slot)
    return evictions


def drain(evictions: EvictionOrder, *, now_s: float = 1000.0) -> list[int]:
    slots = []
    while (slot := evictions.next(now_s=now_s, may_leave=lambda _: True)) is not None:
        slots.append(slot)
        evictions.check()
    return slots


def test_the_least_recently_used_leaves_first_wherever_it_is() -> None:
    evictions = order("lru", 100_000, 0, 32)
    evictions.use(0, at_s=7.0)
    assert drain(evictions) == [1, 2, 0]


def test_of_equal_age_the_later_block_leaves_first() -> None:
    evictions = order("lru", 0, 16, 32)
    for slot in range(3):
        evictions.use(slot, at_s=5.0)
    assert drain(evictions) == [2, 1, 0]


def test_a_block_that_costs_twice_as_much_is_kept_until_it_is_idle_for_twice_as_long() -> None:
    expensive, cheap = ATTENTION_EQUALS_LINEAR_TOKENS, 0
    evictions = order("cost", expensive, cheap)
    evictions.use(0, at_s=0.0)
    evictions.use(1, at_s=100.0)
    assert drain(evictions, now_s=180.0) == [0, 1]
    for slot in range(2):
        evictions.queue(slot)
    assert drain(evictions, now_s=200.0) == [1, 0]


def test_what_may_not_leave_is_passed_over_until_it_is_queued_again() -> None:
    evictions = order("lru", 0, 16)
    assert evictions.next(now_s=9.0, may_leave=lambda slot: slot == 1) == 1
    assert evictions.next(now_s=9.0, may_leave=lambda _: True) is None
    assert not evictions.is_queued(0)
    evictions.queue(0)
    assert drain(evictions) == [0]


def test_a_slot_that_holds_another_block_by_now_leaves_in_its_new_turn() -> None:
    evictions = order("cost", 0, 0)
    evictions.place([0], first_position=5000, at_s=900.0)
    evictions.queue(0)
    evictions.check()
    assert drain(evictions) == [1, 0]


def test_blocks_of_a_long_run_have_the_cost_of_their_own_places() -> None:
    num_blocks = 2 * ATTENTION_EQUALS_LINEAR_TOKENS // 16
    at_once, singly = (
        EvictionOrder(num_blocks, policy=POLICIES["cost"], block_size_tokens=16) for _ in range(2)
    )
    at_once.place(range(num_blocks), first_position=0, at_s=1.0)
    for slot in range(num_blocks):
        singly.place([slot], first_position=slot, at_s=1.0)
    values = [[order.value(slot, now_s=9.0) for slot in range(num_blocks)] for order in (at_once, singly)]
    assert values[0] == values[1]
    assert len(set(values[0])) > 2
