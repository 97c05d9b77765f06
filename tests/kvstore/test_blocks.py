import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blocks import BLOCK_SIZE_TOKENS, DIGEST_BYTES, chain_keys, child_key, root_key

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=5 * BLOCK_SIZE_TOKENS)


def test_keys_are_what_every_version_and_machine_has_computed_so_far() -> None:
    root = root_key(model_fingerprint=b"fingerprint", adapter="adapter", cache_salt="salt")
    assert root.hex() == "40b83fc794cab05a511c07adbea8d3b1"
    token_ids = [*range(BLOCK_SIZE_TOKENS), 151_643, *range(2**32 - BLOCK_SIZE_TOKENS + 1, 2**32)]
    assert [key.hex() for key in chain_keys(root, token_ids)] == [
        "0e5e2957dbde33eab6010eb61e777fde",
        "3050d62522acc62d1ef7e36abe2c1587",
    ]


@given(TOKENS)
def test_a_chain_is_its_child_keys_one_after_the_other(token_ids: list[int]) -> None:
    key = root_key(model_fingerprint=b"m")
    chain = list(chain_keys(key, token_ids))
    assert len(chain) == len(token_ids) // BLOCK_SIZE_TOKENS
    for block, chained in enumerate(chain):
        key = child_key(key, token_ids[block * BLOCK_SIZE_TOKENS : (block + 1) * BLOCK_SIZE_TOKENS])
        assert key == chained
        assert len(key) == DIGEST_BYTES


@given(TOKENS, TOKENS)
def test_chains_agree_exactly_as_far_as_the_blocks_do(left: list[int], right: list[int]) -> None:
    root = root_key(model_fingerprint=b"m")
    pairs = zip(chain_keys(root, left), chain_keys(root, right), strict=False)
    for block, (left_key, right_key) in enumerate(pairs, start=1):
        end = block * BLOCK_SIZE_TOKENS
        assert (left_key == right_key) == (left[:end] == right[:end])


def test_roots_differ_in_every_part_and_parts_do_not_run_into_each_other() -> None:
    roots = [
        root_key(model_fingerprint=fingerprint, adapter=adapter, cache_salt=salt)
        for fingerprint in (b"", b"m", b"mm")
        for adapter in ("", "m", "mm")
        for salt in ("", "m", "mm")
    ]
    assert len(set(roots)) == len(roots)


@pytest.mark.parametrize("num_tokens", [0, BLOCK_SIZE_TOKENS - 1, BLOCK_SIZE_TOKENS + 1])
def test_a_block_that_is_not_full_has_no_key(num_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"got {num_tokens}"):
        child_key(root_key(model_fingerprint=b"m"), [1] * num_tokens)


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_a_token_id_that_does_not_fit_the_format_is_refused(token_id: int) -> None:
    with pytest.raises(ValueError, match="token id"):
        child_key(root_key(model_fingerprint=b"m"), [token_id] * BLOCK_SIZE_TOKENS)
