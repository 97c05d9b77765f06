import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import BlockKey, chain_keys, root_key
from kvstore.coded_chunks import ChunkId, CodedChunks


def chunk_id(number: int, *, level: int = 1) -> ChunkId:
    return ChunkId.of([BlockKey(bytes([number]) * 32)], level=level)


def keep(chunks: CodedChunks, number: int, num_bytes: int) -> None:
    chunks.put(chunk_id(number), bytes(num_bytes), edition=chunks.edition)
    chunks.check()


def test_what_was_put_is_had_until_the_bound_and_the_least_recently_used_goes_first() -> None:
    chunks = CodedChunks(capacity_bytes=100)
    keep(chunks, 1, 40)
    keep(chunks, 2, 40)
    assert chunks.get(chunk_id(1)) == bytes(40)
    keep(chunks, 3, 40)
    assert chunks.get(chunk_id(2)) is None
    assert chunks.get(chunk_id(1)) == chunks.get(chunk_id(3)) == bytes(40)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 60))))
def test_no_more_bytes_are_kept_than_may_be(puts: list[tuple[int, int]]) -> None:
    chunks = CodedChunks(capacity_bytes=50)
    for number, num_bytes in puts:
        keep(chunks, number, num_bytes)


def test_a_chunk_larger_than_all_may_be_displaces_nothing() -> None:
    chunks = CodedChunks(capacity_bytes=100)
    keep(chunks, 1, 40)
    keep(chunks, 2, 101)
    assert (len(chunks), chunks.num_bytes) == (1, 40)


def test_levels_and_lengths_and_tenants_have_chunks_of_their_own() -> None:
    tokens = range(64)
    keys, others = (
        list(chain_keys(root_key(model_fingerprint=b"m" * 32, cache_salt=salt), tokens))
        for salt in ("a", "b")
    )
    ids = {ChunkId.of(keys, level=1), ChunkId.of(keys, level=2), ChunkId.of(keys[1:], level=1)}
    assert len(ids | {ChunkId.of(others, level=1)}) == 4


def test_what_was_read_before_a_drop_does_not_return_after_it() -> None:
    chunks = CodedChunks(capacity_bytes=100)
    keep(chunks, 1, 40)
    edition = chunks.edition
    chunks.drop()
    chunks.put(chunk_id(2), bytes(10), edition=edition)
    assert (len(chunks), chunks.num_bytes) == (0, 0)
    keep(chunks, 1, 40)
    assert chunks.num_bytes == 40


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="got -1"):
        CodedChunks(capacity_bytes=-1)
