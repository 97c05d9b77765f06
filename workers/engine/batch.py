"""Turns the rows of a step plan into the arrays that the model reads.

T tokens of the step, R rows, B tokens per page, L pages of the longest request, S rows that sample.
"""

from collections.abc import Sequence

import numpy as np
import torch

from workers.model.token_batch import Chunk, TokenBatch
from workers.request import PageId
from workers.step import ScheduledRequest


class BatchBuilder:
    """Keeps the page table from step to step and rewrites only rows whose pages changed."""

    def __init__(self, *, block_size_tokens: int, max_pages_per_request: int) -> None:
        self._block = block_size_tokens
        self._table_RL = np.zeros((8, max_pages_per_request), dtype=np.int32)
        self._in_table: list[tuple[PageId, ...]] = [()] * len(self._table_RL)

    def build(self, rows: Sequence[ScheduledRequest]) -> tuple[TokenBatch, list[ScheduledRequest]]:
        """The batch (valid until the next), and the rows that sample in the order of its logits."""
        singles = [row for row in rows if row.num_new_tokens == 1]
        ordered = singles + [row for row in rows if row.num_new_tokens > 1]
        self._update_table(ordered)
        counts_R = np.array([row.num_new_tokens for row in ordered], dtype=np.int64)
        starts_R = np.array([row.num_computed_tokens for row in ordered], dtype=np.int64)
        stops_R = np.cumsum(counts_R)  # in the tokens of the step
        positions_T = np.arange(stops_R[-1]) + np.repeat(starts_R - (stops_R - counts_R), counts_R)
        rows_T = np.repeat(np.arange(len(ordered)), counts_R)
        pages_T = self._table_RL[rows_T, positions_T // self._block].astype(np.int64)
        table_RL = torch.from_numpy(self._table_RL)
        samples_R = np.array([row.samples for row in ordered], dtype=bool)
        batch = TokenBatch(
            token_ids_T=torch.tensor([token for row in ordered for token in _new_tokens(row)]),
            positions_T=torch.from_numpy(positions_T),
            slots_T=torch.from_numpy(pages_T * self._block + positions_T % self._block),
            rows_T=torch.from_numpy(rows_T),
            table_RL=table_RL,
            num_singles=len(singles),
            chunks=tuple(
                Chunk(
                    start=int(stops_R[number] - counts_R[number]),
                    stop=int(stops_R[number]),
                    num_prefix=ordered[number].num_computed_tokens,
                    pages=table_RL[number],
                )
                for number in range(len(singles), len(ordered))
            ),
            sampled_S=torch.from_numpy(stops_R[samples_R] - 1),
        )
        return batch, [row for row in ordered if row.samples]

    def _update_table(self, rows: list[ScheduledRequest]) -> None:
        while len(rows) > len(self._table_RL):
            self._table_RL = np.concatenate((self._table_RL, np.zeros_like(self._table_RL)))
            self._in_table += [()] * len(self._in_table)
        for number, row in enumerate(rows):
            if self._in_table[number] != row.page_ids:
                self._table_RL[number, : len(row.page_ids)] = row.page_ids
                self._in_table[number] = row.page_ids


def _new_tokens(row: ScheduledRequest) -> list[int]:
    return row.request.token_range(row.num_computed_tokens, row.num_computed_tokens + row.num_new_tokens)
