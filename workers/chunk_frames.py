"""What a puller wants, as the frame that goes out: raw from its slots, coded before, or encoded now. In threads."""

from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial

import numpy as np

from kvstore.block_stream import RAW_LEVEL, Want, seal_chunk
from kvstore.blocks import BlockKey
from kvstore.codec.codec import KvCodec
from kvstore.coded_chunks import ChunkId, CodedChunks
from kvstore.data_plane import SealedFrame
from kvstore.errors import TransferRefused
from kvstore.store import BlockStore
from workers.kv_metrics import KvMetrics
from workers.threads import run_to_end


class ChunkFrames:
    def __init__(
        self, store: BlockStore, *, codec: KvCodec, coded: CodedChunks, metrics: KvMetrics, threads: Executor
    ) -> None:
        self.codec = codec
        self.coded = coded
        self._store = store
        self._metrics = metrics
        self._threads = threads

    async def make(self, want: Want, keys: Sequence[BlockKey]) -> SealedFrame:
        """Raises TransferRefused if the blocks are gone, also when they are known coded."""
        edition = self.coded.edition
        with await self._store.pin(keys) as pinned:
            if len(pinned.slots) < want.num_blocks:
                raise TransferRefused(f"block {want.first_block + len(pinned.slots)} is not held any more")
            if want.level == RAW_LEVEL:
                return await run_to_end(self._threads, partial(self._seal_raw, want, pinned.slots))
            chunk_id = ChunkId.of(keys, level=want.level)
            chunk = self.coded.get(chunk_id)
            self._metrics.coded_cache("miss" if chunk is None else "hit", num_bytes=self.coded.num_bytes)
            if chunk is None:
                encode = partial(self.codec.encode, self._store.arena_SX, pinned.slots, level=want.level)
                chunk = await run_to_end(self._threads, encode)
                self.coded.put(chunk_id, chunk, edition=edition)
            return await run_to_end(self._threads, partial(seal_chunk, want, memoryview(chunk)))

    def _seal_raw(self, want: Want, slots: Sequence[int]) -> SealedFrame:
        arena_SX = self._store.arena_SX
        # Not arena_SX[slots]: that took 193 ms for 32 MiB on one of two busy cores, this 13.
        raw_NX = np.empty((len(slots), arena_SX.shape[1]), np.uint8)
        np.take(arena_SX, slots, axis=0, out=raw_NX, mode="clip")
        return seal_chunk(want, raw_NX.reshape(-1).data)
