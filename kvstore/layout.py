"""The exact shape of a KV block in memory. Two workers can exchange blocks only if their layouts are equal."""

from dataclasses import dataclass

from kvstore.blocks import BLOCK_SIZE_TOKENS

WHOLE_DTYPES = ("float32", "bfloat16")  # in which models are computed
SCALED_DTYPES = ("int8", "fp8")  # numbers of 8 bits (fp8 is E4M3), with a scale for each token and head
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "fp8": 1}
SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class KvLayout:
    """Per layer and block: the keys [kv head, token, head dim], then the values in the same order; of scaled dtypes
    then the scales in float32, of the keys [kv head, token] and of the values. A value is its number times its scale.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_size_tokens: int = BLOCK_SIZE_TOKENS

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(ITEM_BYTES)}, got {self.dtype!r}")

    @property
    def is_scaled(self) -> bool:
        return self.dtype in SCALED_DTYPES

    @property
    def bytes_per_value(self) -> float:
        """With its share of a scale."""
        scale_bytes = SCALE_BYTES / self.head_dim if self.is_scaled else 0.0
        return ITEM_BYTES[self.dtype] + scale_bytes

    @property
    def layer_numbers_bytes(self) -> int:
        """Keys and values of one block in one layer, without their scales."""
        return self._layer_rows * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def layer_block_bytes(self) -> int:
        """Keys and values of one block in one layer."""
        scales_bytes = self._layer_rows * SCALE_BYTES if self.is_scaled else 0
        return self.layer_numbers_bytes + scales_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_block_bytes

    @property
    def _layer_rows(self) -> int:
        return 2 * self.num_kv_heads * self.block_size_tokens
