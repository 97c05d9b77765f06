"""The exact shape of a KV block in memory. Two workers can exchange blocks only if their layouts are equal."""

from dataclasses import dataclass

from kvstore.blocks import BLOCK_SIZE_TOKENS

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class KvLayout:
    """Per layer and block: the keys [kv head, token, head dim], then the values in the same order."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_size_tokens: int = BLOCK_SIZE_TOKENS

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(ITEM_BYTES)}, got {self.dtype!r}")

    @property
    def layer_block_bytes(self) -> int:
        """Keys and values of one block in one layer."""
        return 2 * self.num_kv_heads * self.block_size_tokens * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_block_bytes
