"""The tokens of one step, as the model sees them.

T tokens of the step (all rows end to end), R rows, B tokens per page, L longest page list, S rows that sample.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A row of more than one token: tokens start..stop-1 of the step, after `num_prefix` tokens of `pages`."""

    start: int
    stop: int
    num_prefix: int
    pages: torch.Tensor  # int32 page ids of the row, in order; a prefix of them holds the prefix


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkBounds:
    """All chunks of a step for who computes them in one launch; tensors on the device that computes."""

    starts: torch.Tensor  # of the N chunks and the end of the last, counted from the first token of the first
    lengths_N: torch.Tensor  # of the contexts, with the chunks themselves


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """First the tokens of the rows with one token, then the chunks. All tensors int64 but the table."""

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor  # page * B + place: where the token's key and value go
    rows_T: torch.Tensor  # the token's row of the table
    table_RL: torch.Tensor  # int32 page ids
    num_singles: int  # tokens of rows with one token
    chunks: tuple[Chunk, ...]
    sampled_S: torch.Tensor  # the tokens whose logits are wanted, in the order they are wanted
    chunk_bounds: ChunkBounds | None = None  # for a GPU's operations, and where there are chunks
