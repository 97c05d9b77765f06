"""A store's side of an offer: what it does not hold yet it pulls from the offerer, raw, and keeps."""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvstore.block_stream import RAW_LEVEL, chunk_blocks
from kvstore.store import BlockStore, Reservation
from kvstore.tiers.tier import BlockRun
from workers.errors import PullError
from workers.fetch import BlockFetcher, Chunk, Fetch
from workers.logs import log_event
from workers.request import KvHolder
from workers.threads import run_to_end

NUM_WANTS = 2  # chunks asked for at a time

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Taken:
    """Blocks of an offer that are held now, and those that were before. The rest could not be had."""

    num_taken: int
    num_known: int


class OfferIntake:
    """At most `max_offers` are pulled at a time; others wait for them until their deadline."""

    def __init__(self, store: BlockStore, *, fetcher: BlockFetcher, max_offers: int) -> None:
        self._store = store
        self._fetcher = fetcher
        self._chunk_blocks = chunk_blocks(block_bytes=store.arena_SX.shape[1])
        self._turns = asyncio.Semaphore(max_offers)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="intake")

    async def take(self, runs: Sequence[BlockRun], holder: KvHolder) -> Taken:
        """Whatever the offerer does, it costs no more than the offer. Cancelled, it leaves nothing behind."""
        num_taken = num_known = 0
        async with self._turns:
            for run in runs:
                num_held = len(self._store.lookup(run.keys))
                num_known += num_held
                if num_held < len(run.keys):
                    try:
                        num_taken += await self._pull(run.part(num_held, len(run.keys)), holder)
                    except PullError as error:
                        log_event(
                            _logger,
                            "offer_lost",
                            level=logging.WARNING,
                            holder=holder.worker_id,
                            detail=str(error),
                        )
        return Taken(num_taken, num_known)

    def close(self) -> None:
        """After the last `take` has ended."""
        self._threads.shutdown()

    async def _pull(self, run: BlockRun, holder: KvHolder) -> int:
        async with await self._fetcher.open(holder, run.keys) as fetch:
            run = run.part(0, fetch.num_blocks)
            starts = range(0, len(run.keys), self._chunk_blocks)
            num_wanted = 0
            for number, start in enumerate(starts):
                while num_wanted < min(number + NUM_WANTS, len(starts)):
                    await self._want(fetch, starts[num_wanted], num_blocks=len(run.keys))
                    num_wanted += 1
                chunk = await fetch.receive()
                if not await self._keep(run.part(start, start + chunk.num_blocks), chunk):
                    return start
            return len(run.keys)

    async def _want(self, fetch: Fetch, start: int, *, num_blocks: int) -> None:
        num_wanted = min(self._chunk_blocks, num_blocks - start)
        await fetch.want(first_block=start, num_blocks=num_wanted, level=RAW_LEVEL)

    async def _keep(self, run: BlockRun, chunk: Chunk) -> bool:
        """False if memory is full of blocks in use."""
        reservation = self._store.reserve(chunk.num_blocks)
        if reservation is None:
            return False
        with reservation:
            await run_to_end(self._threads, partial(self._copy, chunk, reservation))
            reservation.commit(run, slots=reservation.slots)
        return True

    def _copy(self, chunk: Chunk, reservation: Reservation) -> None:
        blocks_NX = np.frombuffer(chunk.payload, np.uint8).reshape(chunk.num_blocks, -1)
        self._store.arena_SX[list(reservation.slots)] = blocks_NX
