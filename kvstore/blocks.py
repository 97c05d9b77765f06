"""The identity of a KV block: a chained, versioned, keyed digest over everything its content depends on."""

import struct
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NewType

BLOCK_SIZE_TOKENS = 16
DIGEST_BYTES = 16
# Part of the key, so that a change of the format makes digests that match nothing instead of digests that
# lie.
FORMAT_VERSION = b"penstock-block-1"

_BLOCK_BYTES = 4 * BLOCK_SIZE_TOKENS

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
    return _chained(parent, _pack(token_ids))


def chain_keys(root: BlockKey, token_ids: Sequence[int]) -> Iterator[BlockKey]:
    """The keys of all full blocks of `token_ids`, first to last; a partly filled last block has none."""
    num_full = len(token_ids) // BLOCK_SIZE_TOKENS * BLOCK_SIZE_TOKENS
    packed = _pack(token_ids[:num_full])
    key = root
    for start in range(0, len(packed), _BLOCK_BYTES):
        key = _chained(key, packed[start : start + _BLOCK_BYTES])
        yield key


def _chained(parent: BlockKey, packed_block: bytes) -> BlockKey:
    return BlockKey(blake2b(parent + packed_block, digest_size=DIGEST_BYTES, key=FORMAT_VERSION).digest())


def _pack(token_ids: Sequence[int]) -> bytes:
    # Little-endian whatever the machine: keys are compared between machines.
    try:
        return struct.pack(f"<{len(token_ids)}I", *token_ids)
    except struct.error as error:
        raise ValueError(f"a token id is an integer from 0 to 2**32 - 1: {error}") from error
