"""Launches the steps of `generations` on a device, and reads what they sampled when asked to.

What a decode step needs lies on the device from step to step: of each slot its last token, how many tokens it has
computed, and its pages. So the next step can be launched before anybody here knows what the last one sampled, and a
step of a given size is the same program each time, with other slots: it can be captured once and replayed.

N rows of the step, S slots, L pages of the longest answer, B tokens per page, T tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import fields
from itertools import chain

import torch

from workers.engine.decode_buckets import bucket_for, decode_buckets
from workers.engine.device_copies import Launched, to_device
from workers.engine.draws import StepDraws, draws_of
from workers.engine.generations import Generation, OfflineLimits, OfflineStep, PromptChunk
from workers.engine.graph_capture import Capture, Run
from workers.model.token_batch import Chunk, ChunkBounds, TokenBatch

Forward = Callable[[TokenBatch], torch.Tensor]
Sample = Callable[[torch.Tensor, StepDraws], torch.Tensor]


class DeviceRunner:
    """Not to be used by two threads at once. With `capture`, decode steps are captured by size and replayed."""

    def __init__(
        self,
        limits: OfflineLimits,
        *,
        forward: Forward,
        sample: Sample,
        device: torch.device,
        capture: Capture | None = None,
    ) -> None:
        self._limits, self._forward, self._sample, self._device = limits, forward, sample, device
        num_rows, num_pages = limits.num_slots + 1, limits.pages_for(limits.max_model_len)
        # The last slot and page 0 are where padded rows read and write.
        self._padding_slot = limits.num_slots
        self._table_SL = torch.zeros(num_rows, num_pages, dtype=torch.int32, device=device)
        self._last_token_S = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._length_S = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._capture = capture
        self._buckets = decode_buckets(limits.num_slots)
        self._captured: dict[tuple[int, bool], _CapturedDecode] = {}

    @torch.inference_mode()
    def launch(self, step: OfflineStep) -> Launched:
        return self._launch_chunks(step.chunks) if step.chunks else self._launch_decode(step.decoding)

    def _launch_chunks(self, chunks: tuple[PromptChunk, ...]) -> Launched:
        for chunk in chunks:
            if chunk.start == 0:
                self._table_SL[chunk.slot, : len(chunk.page_ids)] = self._on_device(
                    torch.tensor(chunk.page_ids, dtype=torch.int32)
                )
        logits_NV = self._forward(self._chunk_batch(chunks))
        sampling = [chunk for chunk in chunks if chunk.samples]
        if not sampling:
            return Launched(torch.empty(0, dtype=torch.int64))
        slot_N = self._on_device(torch.tensor([chunk.slot for chunk in sampling]))
        token_N = self._sampled(logits_NV, self._draws([chunk.generation for chunk in sampling]))
        self._last_token_S.index_copy_(0, slot_N, token_N)
        self._length_S.index_copy_(0, slot_N, self._on_device(torch.tensor([c.stop for c in sampling])))
        return Launched(token_N)

    def _chunk_batch(self, chunks: tuple[PromptChunk, ...]) -> TokenBatch:
        """All as chunks, even of one token: a prompt's last token alone is rare."""
        sizes = [chunk.stop - chunk.start for chunk in chunks]
        token_ids = chain.from_iterable(
            chunk.generation.prompt_token_ids[chunk.start : chunk.stop] for chunk in chunks
        )
        rows_T = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(sizes))
        ends = torch.tensor(sizes).cumsum(0)
        samples = torch.tensor([chunk.samples for chunk in chunks])
        positions_T = self._on_device(torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks]))
        rows_T = self._on_device(rows_T)
        table_NL = self._table_SL[self._on_device(torch.tensor([chunk.slot for chunk in chunks]))]
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), ends))
        bounds = starts.tolist()
        return TokenBatch(
            token_ids_T=self._on_device(torch.tensor(list(token_ids))),
            positions_T=positions_T,
            slots_T=self._slots(table_NL, rows_T, positions_T),
            rows_T=rows_T,
            table_RL=table_NL,
            num_singles=0,
            chunks=tuple(
                Chunk(
                    start=bounds[number],
                    stop=bounds[number + 1],
                    num_prefix=chunk.start,
                    pages=table_NL[number],
                )
                for number, chunk in enumerate(chunks)
            ),
            sampled_S=self._on_device(ends[samples] - 1),
            chunk_bounds=ChunkBounds(
                starts=self._on_device(starts),
                lengths_N=self._on_device(torch.tensor([chunk.stop for chunk in chunks])),
            ),
        )

    def _launch_decode(self, generations: tuple[Generation, ...]) -> Launched:
        slots, num_rows = [generation.slot for generation in generations], len(generations)
        if self._capture is None:
            slot_N = self._on_device(torch.tensor(slots))
            return Launched(self._decode(slot_N, self._draws(generations)))
        is_greedy = all(generation.sampling.temperature == 0 for generation in generations)
        bucket = bucket_for(num_rows, self._buckets)
        captured = self._captured.get((bucket, is_greedy))
        if captured is None:
            captured = self._captured[bucket, is_greedy] = self._capture_decode(bucket, is_greedy=is_greedy)
        slot_N = torch.tensor(slots + [self._padding_slot] * (bucket - num_rows))
        draws = None if is_greedy else self._draws(generations, num_padding=bucket - num_rows)
        return Launched(captured.replay(self._on_device(slot_N), draws)[:num_rows])

    def _capture_decode(self, bucket: int, *, is_greedy: bool) -> "_CapturedDecode":
        """A program of `bucket` rows, run and captured on the padding slot alone."""
        assert self._capture is not None
        slot_N = torch.full((bucket,), self._padding_slot, device=self._device)
        draws = None if is_greedy else self._draws([], num_padding=bucket)
        run = self._capture(lambda: self._decode(slot_N, draws))
        return _CapturedDecode(run, slot_N, draws)

    def _decode(self, slot_N: torch.Tensor, draws: StepDraws | None) -> torch.Tensor:
        """One more token for each of these slots; without draws the likeliest."""
        position_N = self._length_S[slot_N]
        num_rows = len(slot_N)
        batch = TokenBatch(
            token_ids_T=self._last_token_S[slot_N],
            positions_T=position_N,
            slots_T=self._slots(self._table_SL, slot_N, position_N),
            rows_T=slot_N,
            table_RL=self._table_SL,
            num_singles=num_rows,
            chunks=(),
            sampled_S=torch.arange(num_rows, device=self._device),
        )
        token_N = self._sampled(self._forward(batch), draws)
        self._last_token_S.index_copy_(0, slot_N, token_N)
        self._length_S.index_copy_(0, slot_N, position_N + 1)
        self._length_S[self._padding_slot].zero_()
        return token_N

    def _sampled(self, logits_NV: torch.Tensor, draws: StepDraws | None) -> torch.Tensor:
        return logits_NV.argmax(-1) if draws is None else self._sample(logits_NV, draws)

    def _slots(self, table_RL: torch.Tensor, rows_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        block = self._limits.block_size_tokens
        pages_T = table_RL[rows_T, positions_T // block].long()
        return pages_T * block + positions_T % block

    def _draws(
        self, generations: list[Generation] | tuple[Generation, ...], *, num_padding: int = 0
    ) -> StepDraws | None:
        """None where all are greedy and nothing is padded."""
        rows = [(generation.sampling, generation.num_launched_outputs) for generation in generations]
        if not num_padding and all(sampling.temperature == 0 for sampling, _ in rows):
            return None
        draws = draws_of(rows, num_padding=num_padding)
        return StepDraws(
            **{field.name: self._on_device(getattr(draws, field.name)) for field in fields(draws)}
        )

    def _on_device(self, x: torch.Tensor) -> torch.Tensor:
        return to_device(x, self._device)


class _CapturedDecode:
    """A decode step of a fixed number of rows, and the memory that it reads its slots and draws from."""

    def __init__(self, run: Run, slot_N: torch.Tensor, draws: StepDraws | None) -> None:
        self._run, self._slot_N, self._draws = run, slot_N, draws

    def replay(self, slot_N: torch.Tensor, draws: StepDraws | None) -> torch.Tensor:
        """The tokens: memory that the next replay overwrites."""
        self._slot_N.copy_(slot_N)
        if self._draws is not None and draws is not None:
            for field in fields(draws):
                getattr(self._draws, field.name).copy_(getattr(draws, field.name))
        return self._run()
