"""A store's side of an offer: what it does not hold yet it pulls from the offerer, raw, and keeps."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from kvstore.block_stream import RAW_LEVEL, chunk_blocks
from kvstore.store import BlockStore, Reservation
from kvstore.tiers.tier import BlockRun
from workers.errors import PullError, PullRefused
from workers.fetch import BlockFetcher, Chunk, Fetch
from workers.logs import log_event
from workers.raw_blocks import copy_raw
from workers.request import KvHolder
from workers.threads import run_to_end

NUM_WANTS = 2  # chunks asked for at a time
MAX_WAITING_OFFERS = 256  # each worker has one under way
# Of one offer, whatever its caller is ready to wait: the next one shall have its turn.
MAX_OFFER_S = 30.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Taken:
    """Blocks of an offer that are held now, and those that were before. The rest could not be had."""

    num_taken: int
    num_known: int


class TooManyOffers(Exception):
    """So many wait for their turn."""


class OfferIntake:
    """At most `max_offers` are pulled at a time; others wait for them until their deadline."""

    def __init__(
        self, store: BlockStore, *, fetcher: BlockFetcher, max_offers: int, timeout_s: float = MAX_OFFER_S
    ) -> None:
        self._store = store
        self._fetcher = fetcher
        self._chunk_blocks = chunk_blocks(block_bytes=store.arena_SX.shape[1])
        self._turns = asyncio.Semaphore(max_offers)
        self._num_waiting = self._num_taking = self._num_unsettled_blocks = 0
        self._rested = asyncio.Event()
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="intake")

    async def take(self, runs: Sequence[BlockRun], holder: KvHolder) -> Taken:
        """Whatever the offerer does, it costs no more than the offer. Cancelled, it leaves nothing behind.

        Raises TooManyOffers.
        """
        num_blocks = sum(len(run.keys) for run in runs)
        self._num_unsettled_blocks += num_blocks
        try:
            async with self._turn():
                return await self._take_all(runs, holder)
        finally:
            self._num_unsettled_blocks -= num_blocks

    @property
    def num_unsettled_blocks(self) -> int:
        """Of offers that are being taken or wait for their turn."""
        return self._num_unsettled_blocks

    @property
    def is_quiet(self) -> bool:
        """No offer is being taken or waits for its turn."""
        return self._num_waiting == self._num_taking == 0

    async def settled(self) -> None:
        """Returns once it is quiet."""
        while not self.is_quiet:
            self._rested.clear()
            await self._rested.wait()

    def close(self) -> None:
        """After the last `take` has ended."""
        self._threads.shutdown()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._num_waiting >= MAX_WAITING_OFFERS:
            raise TooManyOffers(f"{self._num_waiting} offers wait, the most this store takes")
        self._num_waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._num_waiting -= 1
        self._num_taking += 1
        try:
            yield
        finally:
            self._num_taking -= 1
            self._turns.release()
            self._rested.set()

    async def _take_all(self, runs: Sequence[BlockRun], holder: KvHolder) -> Taken:
        taken = Taken(0, 0)
        try:
            async with asyncio.timeout(self._timeout_s):
                for run in runs:
                    taken = await self._take(run, holder, taken)
        except TimeoutError:
            _lost(holder, f"it took longer than {self._timeout_s:g} s")
        except PullError as error:  # an offerer that is away or lies is not asked for the other runs
            _lost(holder, str(error))
        return taken

    async def _take(self, run: BlockRun, holder: KvHolder, so_far: Taken) -> Taken:
        num_held = len(self._store.lookup(run.keys))
        num_taken = 0
        if num_held < len(run.keys):
            try:
                num_taken = await self._pull(run.part(num_held, len(run.keys)), holder)
            except PullRefused as error:  # of this run: its blocks may be gone there
                _lost(holder, str(error))
        return Taken(so_far.num_taken + num_taken, so_far.num_known + num_held)

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
        copy_raw(chunk.payload, self._store.arena_SX, reservation.slots, self._fetcher.layout)


def _lost(holder: KvHolder, detail: str) -> None:
    log_event(_logger, "offer_lost", level=logging.WARNING, holder=holder.worker_id, detail=detail)
