from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import BlockKey
from kvstore.prefix_index import PrefixIndex

KEYS = st.lists(st.integers(0, 9).map(lambda n: BlockKey(bytes([n]) * 16)), max_size=10)


@given(present=st.dictionaries(KEYS.filter(bool).map(lambda keys: keys[0]), st.integers()), keys=KEYS)
def test_the_longest_prefix_ends_at_the_first_absent_key(
    present: dict[BlockKey, int], keys: list[BlockKey]
) -> None:
    index: PrefixIndex[int] = PrefixIndex()
    for key, slot in present.items():
        assert index.put(key, slot)
    slots = index.longest_prefix(keys, len(keys))
    assert slots == [present[key] for key in keys[: len(slots)]]
    assert len(slots) == len(keys) or keys[len(slots)] not in present


def test_the_longest_prefix_is_no_longer_than_asked() -> None:
    index: PrefixIndex[int] = PrefixIndex()
    keys = [BlockKey(bytes([n]) * 16) for n in range(4)]
    for slot, key in enumerate(keys):
        index.put(key, slot)
    assert index.longest_prefix(keys, 2) == [0, 1]


def test_a_key_keeps_its_first_slot_until_it_is_removed() -> None:
    index: PrefixIndex[int] = PrefixIndex()
    key = BlockKey(b"k" * 16)
    assert index.put(key, 1)
    assert not index.put(key, 2)
    assert index.get(key) == 1
    assert index.remove(key) == 1
    assert key not in index
    assert len(index) == 0
    assert index.put(key, 2)
    assert list(index) == [key]


@given(held=st.lists(KEYS.filter(bool).map(lambda keys: keys[0]), unique=True), keys=KEYS)
def test_many_keys_are_put_as_if_one_after_the_other(held: list[BlockKey], keys: list[BlockKey]) -> None:
    at_once, singly = PrefixIndex[int](), PrefixIndex[int]()
    for index in (at_once, singly):
        index.put_each(held, [-1] * len(held))
    added = at_once.put_each(keys, range(len(keys)))
    assert added == [singly.put(key, slot) for slot, key in enumerate(keys)]
    assert {key: at_once.get(key) for key in at_once} == {key: singly.get(key) for key in singly}
