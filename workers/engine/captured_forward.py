"""Decode steps as programs of a fixed number of rows, captured once and replayed.

A step with one token a row is done by a GPU sooner than its hundreds of kernels are launched one by one; a program is
launched as one. It reads its rows where they lay when it was captured, so a step's rows are copied there first, and
filled up to the program's size with rows that read and write a page which no request has.

R rows, L pages of the longest request, V vocabulary.
"""

from collections.abc import Callable

import torch

from workers.engine.decode_buckets import bucket_for, decode_buckets
from workers.engine.engine_parts import Forward
from workers.engine.graph_capture import Capture
from workers.model.token_batch import TokenBatch


class DecodeRows:
    """What programs read, and their logits: the smaller ones use the first rows of what the largest has."""

    def __init__(
        self,
        max_rows: int,
        *,
        max_pages_per_request: int,
        vocab_size: int,
        padding_slot: int,
        device: torch.device,
    ) -> None:
        self.max_rows = max_rows
        self._padding_slot = padding_slot
        self._token_ids_R = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._positions_R = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._slots_R = torch.full((max_rows,), padding_slot, device=device)
        self._rows_R = torch.arange(max_rows, device=device)
        self._table_RL = torch.zeros(max_rows, max_pages_per_request, dtype=torch.int32, device=device)
        self.logits_RV = torch.zeros(max_rows, vocab_size, device=device)

    def put(self, batch: TokenBatch, *, size: int) -> None:
        """The rows of `batch`, and as many more as make `size`."""
        used, padding = slice(0, batch.num_singles), slice(batch.num_singles, size)
        self._token_ids_R[used].copy_(batch.token_ids_T)
        self._positions_R[used].copy_(batch.positions_T)
        self._slots_R[used].copy_(batch.slots_T)
        self._table_RL[used].copy_(batch.table_RL)
        # Where an earlier step's rows were: they must not write to its pages again.
        self._positions_R[padding].zero_()
        self._slots_R[padding].fill_(self._padding_slot)

    def batch(self, size: int) -> TokenBatch:
        rows_R = self._rows_R[:size]
        return TokenBatch(
            token_ids_T=self._token_ids_R[:size],
            positions_T=self._positions_R[:size],
            slots_T=self._slots_R[:size],
            rows_T=rows_R,
            table_RL=self._table_RL[:size],
            num_singles=size,
            chunks=(),
            sampled_S=rows_R,
        )


class CapturedForward:
    """`forward` with programs for the steps that only decode. Not to be used by two threads at once."""

    @torch.inference_mode()
    def __init__(self, forward: Forward, rows: DecodeRows, *, capture: Capture) -> None:
        """Captures every size, the largest first, whose memory the others use again.

        Before anything is served: while a GPU's work is captured, no other thread may wait for the GPU or allocate.
        """
        self._forward = forward
        self._rows = rows
        self._sizes = decode_buckets(rows.max_rows)
        self._programs = {size: capture(self._program(size)) for size in reversed(self._sizes)}

    def __call__(
        self, batch: TokenBatch, /, *, on_layer: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        if batch.chunks or on_layer is not None:
            return self._forward(batch, on_layer=on_layer)
        size = bucket_for(batch.num_singles, self._sizes)
        self._rows.put(batch, size=size)
        return self._programs[size]()[batch.sampled_S]

    def _program(self, size: int) -> Callable[[], torch.Tensor]:
        batch, logits_RV = self._rows.batch(size), self._rows.logits_RV[:size]
        return lambda: logits_RV.copy_(self._forward(batch))
