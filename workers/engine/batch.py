"""Turns the rows of a step plan into the arrays that the model reads.

T tokens of the step, R rows with one token, B tokens per page, L pages of the longest request, S rows that sample.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from workers.model.transformer import Chunk, TokenBatch
from workers.request import PageId
from workers.step import ScheduledRequest


class BatchBuilder:
    """Keeps the page table from step to step and rewrites only rows whose pages changed."""

    def __init__(self, *, block_size_tokens: int, max_pages_per_request: int) -> None:
        self._block = block_size_tokens
        self._table_RL = np.zeros((8, max_pages_per_request), dtype=np.int32)
        self._in_table: list[tuple[PageId, ...]] = [()] * len(self._table_RL)

    def build(self, rows: Sequence[ScheduledRequest]) -> tuple[TokenBatch, list[ScheduledRequest]]:
        """The batch, and the rows that sample in the order of its logits."""
        decodes = [row for row in rows if row.num_new_tokens == 1]
        chunks = [row for row in rows if row.num_new_tokens > 1]
        ordered = decodes + chunks
        sampling = [row for row in ordered if row.samples]
        counts = np.array([row.num_new_tokens for row in ordered], dtype=np.int64)
        starts = np.array([row.num_computed_tokens for row in ordered], dtype=np.int64)
        stops_in_step = np.cumsum(counts)
        positions_T = np.arange(counts.sum()) + np.repeat(starts - (stops_in_step - counts), counts)
        samples = np.array([row.samples for row in ordered], dtype=bool)
        batch = TokenBatch(
            token_ids_T=torch.tensor([token for row in ordered for token in _new_tokens(row)]),
            positions_T=torch.from_numpy(positions_T),
            slots_T=torch.from_numpy(self._slots(decodes, chunks, positions_T)),
            table_RL=torch.from_numpy(self._table_RL[: len(decodes)]),
            lengths_R=torch.from_numpy((starts[: len(decodes)] + 1).astype(np.int32)),
            chunks=tuple(
                self._chunk(row, stop)
                for row, stop in zip(chunks, stops_in_step[len(decodes) :].tolist(), strict=True)
            ),
            sampled_S=torch.from_numpy(stops_in_step[samples] - 1),
        )
        return batch, sampling

    def _slots(
        self, decodes: list[ScheduledRequest], chunks: list[ScheduledRequest], positions_T: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        self._update_table(decodes)
        num_decodes, pages_T = len(decodes), np.empty_like(positions_T)
        blocks_T = positions_T // self._block
        pages_T[:num_decodes] = self._table_RL[np.arange(num_decodes), blocks_T[:num_decodes]]
        start = num_decodes
        for row in chunks:
            span = slice(start, start + row.num_new_tokens)
            pages_T[span] = np.array(row.page_ids, dtype=np.int64)[blocks_T[span]]
            start += row.num_new_tokens
        slots_T: npt.NDArray[np.int64] = pages_T * self._block + positions_T % self._block
        return slots_T

    def _update_table(self, decodes: list[ScheduledRequest]) -> None:
        while len(decodes) > len(self._table_RL):
            self._table_RL = np.concatenate((self._table_RL, np.zeros_like(self._table_RL)))
            self._in_table += [()] * len(self._in_table)
        for number, row in enumerate(decodes):
            if self._in_table[number] != row.page_ids:
                self._table_RL[number, : len(row.page_ids)] = row.page_ids
                self._in_table[number] = row.page_ids

    def _chunk(self, row: ScheduledRequest, stop: int) -> Chunk:
        num_prefix_pages = -(-row.num_computed_tokens // self._block)
        return Chunk(
            start=stop - row.num_new_tokens,
            stop=stop,
            num_prefix=row.num_computed_tokens,
            prefix_pages=torch.tensor(row.page_ids[:num_prefix_pages], dtype=torch.int64),
        )


def _new_tokens(row: ScheduledRequest) -> list[int]:
    return row.request.token_range(row.num_computed_tokens, row.num_computed_tokens + row.num_new_tokens)
