"""Turns the rows of a step plan into what the model reads on a device: as `workers.engine.batch`, without numpy.

T tokens of the step, R rows, B tokens per page, L pages of the longest request, N chunks, S rows that sample.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from workers.engine.device_copies import to_device
from workers.engine.latest_tokens import LatestTokens
from workers.model.token_batch import Chunk, ChunkBounds, TokenBatch
from workers.request import PageId
from workers.step import ScheduledRequest


class DeviceBatchBuilder:
    """Keeps the page table on the device from step to step and sends only rows whose pages changed."""

    def __init__(
        self,
        device: torch.device,
        latest: LatestTokens,
        *,
        block_size_tokens: int,
        max_pages_per_request: int,
    ) -> None:
        """`latest` has the tokens that are not known here when a step after theirs is built."""
        self._device = device
        self._latest = latest
        self._block = block_size_tokens
        self._table_RL = torch.zeros(8, max_pages_per_request, dtype=torch.int32, device=device)
        self._in_table: list[tuple[PageId, ...]] = [()] * len(self._table_RL)

    def build(self, rows: Sequence[ScheduledRequest]) -> tuple[TokenBatch, list[ScheduledRequest]]:
        """The batch (valid until the next), and the rows that sample in the order of its logits."""
        singles = [row for row in rows if row.num_new_tokens == 1]
        ordered = singles + [row for row in rows if row.num_new_tokens > 1]
        self._update_table(ordered)
        table_RL = self._table_RL[: len(ordered)]
        counts_R = torch.tensor([row.num_new_tokens for row in ordered])
        positions_T = self._put(torch.cat([torch.arange(*_span(row)) for row in ordered]))
        rows_T = self._put(torch.arange(len(ordered)).repeat_interleave(counts_R))
        pages_T = table_RL[rows_T, positions_T // self._block].long()
        bounds = list(accumulate((row.num_new_tokens for row in ordered), initial=0))
        chunks = range(len(singles), len(ordered))
        batch = TokenBatch(
            token_ids_T=self._token_ids(ordered),
            positions_T=positions_T,
            slots_T=pages_T * self._block + positions_T % self._block,
            rows_T=rows_T,
            table_RL=table_RL,
            num_singles=len(singles),
            chunks=tuple(
                Chunk(
                    start=bounds[number], stop=bounds[number + 1],
                    num_prefix=ordered[number].num_computed_tokens, pages=table_RL[number],
                )
                for number in chunks
            ),
            sampled_S=self._put(
                torch.tensor(
                    [stop - 1 for row, stop in zip(ordered, bounds[1:], strict=True) if row.samples],
                    dtype=torch.int64,
                )
            ),
            chunk_bounds=self._chunk_bounds(ordered[len(singles) :]) if chunks else None,
        )  # fmt: skip
        return batch, [row for row in ordered if row.samples]

    def _token_ids(self, ordered: list[ScheduledRequest]) -> torch.Tensor:
        token_ids_T = self._put(torch.tensor([token for row in ordered for token in _new_tokens(row)]))
        # Each of them is one token, so its place in the step is that of its row.
        unknown = [number for number, row in enumerate(ordered) if not _is_known(row)]
        if unknown:
            latest_N = self._latest.of([ordered[number].request.request_id for number in unknown])
            token_ids_T.index_copy_(0, self._put(torch.tensor(unknown)), latest_N)
        return token_ids_T

    def _chunk_bounds(self, rows: list[ScheduledRequest]) -> ChunkBounds:
        starts = list(accumulate((row.num_new_tokens for row in rows), initial=0))
        return ChunkBounds(
            starts=self._put(torch.tensor(starts)),
            lengths_N=self._put(torch.tensor([_span(row)[1] for row in rows])),
        )

    def _update_table(self, rows: list[ScheduledRequest]) -> None:
        while len(rows) > len(self._table_RL):
            self._table_RL = torch.cat((self._table_RL, torch.zeros_like(self._table_RL)))
            self._in_table += [()] * len(self._in_table)
        changed = [number for number, row in enumerate(rows) if self._in_table[number] != row.page_ids]
        if not changed:
            return
        changed_NL = torch.zeros(len(changed), self._table_RL.shape[1], dtype=torch.int32)
        for pages_L, number in zip(changed_NL, changed, strict=True):
            page_ids = rows[number].page_ids
            pages_L[: len(page_ids)] = torch.tensor(page_ids, dtype=torch.int32)
        self._table_RL.index_copy_(0, self._put(torch.tensor(changed)), self._put(changed_NL))
        for number in changed:  # only now: a device without memory for the copy has the old ones
            self._in_table[number] = rows[number].page_ids

    def _put(self, x: torch.Tensor) -> torch.Tensor:
        return to_device(x, self._device)


def _span(row: ScheduledRequest) -> tuple[int, int]:
    return row.num_computed_tokens, row.end_token


def _is_known(row: ScheduledRequest) -> bool:
    return row.num_computed_tokens < row.request.num_tokens


def _new_tokens(row: ScheduledRequest) -> list[int]:
    return row.request.token_range(*_span(row)) if _is_known(row) else [0]
