"""Made-up KV that looks like a model's, in arenas, and profiles of it."""

from pathlib import Path

import numpy as np

from kvstore.codec.profile import KvProfile, load_profile, make_profile
from kvstore.codec.quantize import Bytes, Floats, num_groups, read_values, write_values_
from kvstore.layout import KvLayout

FINGERPRINT = b"f" * 32


def layout_of(dtype: str, *, head_dim: int = 8) -> KvLayout:
    return KvLayout(num_layers=3, num_kv_heads=2, head_dim=head_dim, dtype=dtype)


def values_of(layout: KvLayout, *, num_tokens: int, seed: int = 0) -> Floats:
    """Channels of different means and spreads, tokens like their neighbours."""
    rng = np.random.default_rng(seed)
    shape = (num_groups(layout), num_tokens, layout.head_dim)
    walk = np.cumsum(rng.normal(size=shape), axis=1) * 0.2
    channel = np.random.default_rng(99)
    spread = np.exp(channel.normal(size=(shape[0], 1, shape[2])) * 0.5)
    mean = channel.normal(size=(shape[0], 1, shape[2])) * 3
    return ((walk - walk.mean(axis=1, keepdims=True) + rng.normal(size=shape)) * spread + mean).astype(
        np.float32
    )


def arena_of(layout: KvLayout, *, num_blocks: int, seed: int = 0) -> Bytes:
    arena_SX = np.zeros((num_blocks, layout.block_bytes), np.uint8)
    values = values_of(layout, num_tokens=num_blocks * layout.block_size_tokens, seed=seed)
    write_values_(arena_SX, range(num_blocks), values, layout=layout)
    return arena_SX


def profile_content(layout: KvLayout, *, fingerprint: bytes = FINGERPRINT, seed: int = 1) -> bytes:
    arena_SX = arena_of(layout, num_blocks=40, seed=seed)
    return make_profile(arena_SX, [range(25), range(25, 40)], fingerprint=fingerprint, layout=layout)


def profile_of(layout: KvLayout, directory: Path, *, seed: int = 1) -> KvProfile:
    path = directory / f"profile-{seed}.safetensors"
    path.write_bytes(profile_content(layout, seed=seed))
    found = load_profile(path, fingerprint=FINGERPRINT, layout=layout)
    assert found is not None
    return found


def largest_error(arena_SX: Bytes, decoded_SX: Bytes, slots: range, *, layout: KvLayout) -> Floats:
    """Per channel [G, C]."""
    difference = read_values(arena_SX, slots, layout=layout) - read_values(decoded_SX, slots, layout=layout)
    found: Floats = np.abs(difference).max(axis=1)
    return found
