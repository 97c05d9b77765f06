"""The identity of a KV block: a chained, versioned, keyed digest over everything its content depends on."""

import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NewType

BLOCK_SIZE_TOKENS = 16
DIGEST_BYTES = 16
# Part of the key, so that a change of the format makes digests that match nothing instead of digests that lie.
FORMAT_VERSION = b"penstock-block-1"

BlockKey = NewType("BlockKey", bytes)


def root_key(*, model_fingerprint: bytes, adapter: str = "", cache_salt: str = "") -> BlockKey:
    """The parent of every first block: equal only for the same model, adapter and tenant salt."""
    digest = blake2b(digest_size=DIGEST_BYTES, key=FORMAT_VERSION)
    for part in (model_fingerprint, adapter.encode(), cache_salt.encode()):
        digest.update(len(part).to_bytes(4, "little"))
        digest.update(part)
    return BlockKey(digest.digest())


def child_key(parent: BlockKey, token_ids: Sequence[int]) -> BlockKey:
    """The key of the block that holds `token_ids` (exactly BLOCK_SIZE_TOKENS of them) after `parent`."""
    if len(token_ids) != BLOCK_SIZE_TOKENS:
        raise ValueError(f"a block has {BLOCK_SIZE_TOKENS} tokens, got {len(token_ids)}")
    return BlockKey(
        blake2b(
            parent + array.array("I", token_ids).tobytes(), digest_size=DIGEST_BYTES, key=FORMAT_VERSION
        ).digest()
    )


def chain_keys(root: BlockKey, token_ids: Sequence[int]) -> Iterator[BlockKey]:
    """The keys of all full blocks of `token_ids`, first to last; a partly filled last block has none."""
    key = root
    for start in range(0, len(token_ids) - BLOCK_SIZE_TOKENS + 1, BLOCK_SIZE_TOKENS):
        key = child_key(key, token_ids[start : start + BLOCK_SIZE_TOKENS])
        yield key
