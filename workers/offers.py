"""What this worker tells the stores: "I hold these blocks, pull them from me if you want them".

A conversation lands on one store, so that its next turn finds all of it there: runs follow the store of the run they
continue, and a chain's first run picks one by rendezvous hashing. Nothing here may hold up serving: offers that cannot
be made are dropped, the oldest first, and a store that does not answer is left alone for a while.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import grpc

from kvstore.blocks import FORMAT_VERSION, BlockKey
from kvstore.layout import KvLayout
from kvstore.tiers.tier import BlockRun
from protos import kv_pb2, kv_pb2_grpc
from workers.block_wire import MAX_RUNS_PER_OFFER, holder_to_wire, runs_to_wire
from workers.channels import Channels
from workers.handoff_wire import layout_to_wire
from workers.logs import log_event
from workers.request import KvHolder

MAX_IDLE_CHANNELS = 8
# Where the blocks of so many runs went: 10 MB.
MAX_REMEMBERED_RUNS = 2**16

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class OfferLimits:
    max_waiting_blocks: int = 8192
    max_blocks_per_offer: int = 512
    timeout_s: float = 30.0  # for a store to answer, which it does when it has pulled
    first_backoff_s: float = 1.0
    last_backoff_s: float = 30.0

    def __post_init__(self) -> None:
        for name in (
            "max_waiting_blocks", "max_blocks_per_offer", "timeout_s", "first_backoff_s", "last_backoff_s",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreAddress:
    """A store as the directory names it."""

    worker_id: str
    epoch: int
    control_address: str


@dataclass(frozen=True, slots=True)
class _Offer:
    run: BlockRun
    is_extra: bool


@dataclass(kw_only=True, slots=True)
class _Store:
    address: StoreAddress
    backoff_s: float
    ready_at_s: float = 0.0


class Offers:
    """`offer` and `set_stores` at any time; `run` for as long as the worker lives."""

    def __init__(
        self,
        *,
        model_fingerprint: bytes,
        layout: KvLayout,
        tell: Callable[[int, str], None],
        limits: OfferLimits = OfferLimits(),
    ) -> None:
        self.num_taken = self.num_known = self.num_dropped = 0  # blocks, since the start
        self._model_fingerprint = model_fingerprint
        self._layout = layout
        self._tell = tell  # what became of so many blocks
        self._limits = limits
        self._stores: dict[str, _Store] = {}
        self._has_heard_of_stores = False
        self._waiting: OrderedDict[int, _Offer] = OrderedDict()  # by number, oldest first
        self._num_waiting_blocks = 0
        self._numbers = itertools.count()
        self._homes: OrderedDict[BlockKey, BlockKey] = OrderedDict()  # of a run's last key: the chain's first
        self._changed = asyncio.Event()
        self._putting: Sequence[_Offer] = ()
        self._rested = asyncio.Event()

    @property
    def num_stores(self) -> int:
        return len(self._stores)

    @property
    def num_waiting_blocks(self) -> int:
        return self._num_waiting_blocks

    @property
    def num_unsettled_blocks(self) -> int:
        """That stores which answer do not have yet, without the extra ones."""
        return sum(len(offer.run.keys) for offer in self._unsettled() if not offer.is_extra)

    @property
    def num_unsettled_extra_blocks(self) -> int:
        return sum(len(offer.run.keys) for offer in self._unsettled() if offer.is_extra)

    def _unsettled(self) -> Iterable[_Offer]:
        return itertools.chain(self._putting, self._waiting.values() if self._ready_stores() else ())

    def offer(self, run: BlockRun, *, is_extra: bool = False) -> None:
        """This worker's tiers hold `run`, exactly. Forgotten at once where it is known that there is no store.

        Extra is what was on its way to the stores before, and is offered only in case that it is not there.
        """
        if self._has_heard_of_stores and not self._stores:
            return
        for start in range(0, len(run.keys), self._limits.max_blocks_per_offer):
            stop = min(start + self._limits.max_blocks_per_offer, len(run.keys))
            self._waiting[next(self._numbers)] = _Offer(run.part(start, stop), is_extra)
        self._num_waiting_blocks += len(run.keys)
        while self._num_waiting_blocks > self._limits.max_waiting_blocks:
            _, oldest = self._waiting.popitem(last=False)
            self._num_waiting_blocks -= len(oldest.run.keys)
            self._dropped(len(oldest.run.keys))
        self._changed.set()

    def set_stores(self, addresses: Sequence[StoreAddress]) -> None:
        """All that are there now. What is known of one that stays is kept."""
        self._stores = {
            address.worker_id: known
            if (known := self._stores.get(address.worker_id)) and known.address == address
            else _Store(address=address, backoff_s=self._limits.first_backoff_s)
            for address in addresses
        }
        if not self._has_heard_of_stores and not self._stores:
            self._waiting.clear()
            self._num_waiting_blocks = 0
        self._has_heard_of_stores = True
        self._changed.set()

    async def settled(self) -> None:
        """Returns once every store that answers has what it was offered."""
        while any(self._unsettled()):
            self._rested.clear()
            await self._rested.wait()

    async def run(self, holder: KvHolder) -> None:
        """Offers what waits, one store after the other; `holder` is this worker."""
        channels = Channels(max_idle=MAX_IDLE_CHANNELS)
        try:
            while True:
                store, self._putting = await self._next_batch()
                await self._put(channels, store, [offer.run for offer in self._putting], holder)
                self._putting = ()
        finally:
            await channels.close()

    async def _next_batch(self) -> tuple[_Store, list[_Offer]]:
        """Runs for one store, as many as fit an offer; waits until there are any."""
        while True:
            if self._waiting and (ready := self._ready_stores()):
                return self._take_batch(ready)
            self._rested.set()
            self._changed.clear()
            now_s = asyncio.get_running_loop().time()
            away_s = [store.ready_at_s - now_s for store in self._stores.values()] if self._waiting else []
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(away_s, default=None)):
                    await self._changed.wait()

    def _ready_stores(self) -> list[_Store]:
        now_s = asyncio.get_running_loop().time()
        return [store for store in self._stores.values() if store.ready_at_s <= now_s]

    def _take_batch(self, ready: Sequence[_Store]) -> tuple[_Store, list[_Offer]]:
        chosen: _Store | None = None
        batch: list[_Offer] = []
        num_blocks = 0
        for number, offer in list(itertools.islice(self._waiting.items(), MAX_RUNS_PER_OFFER)):
            run = offer.run
            store = _rendezvous(ready, self._home(run))
            if chosen is not None and store is not chosen:
                continue
            if batch and num_blocks + len(run.keys) > self._limits.max_blocks_per_offer:
                break
            chosen = store
            batch.append(offer)
            num_blocks += len(run.keys)
            del self._waiting[number]
        assert chosen is not None, "a batch was asked for and nothing waits"
        self._num_waiting_blocks -= num_blocks
        return chosen, batch

    def _home(self, run: BlockRun) -> BlockKey:
        """The first key of the run's chain, or the last one before what we know of it."""
        home = run.keys[0] if run.first_position == 0 else self._homes.get(run.parent, run.parent)
        self._homes[run.keys[-1]] = home
        self._homes.move_to_end(run.keys[-1])
        if len(self._homes) > MAX_REMEMBERED_RUNS:
            self._homes.popitem(last=False)
        return home

    async def _put(
        self, channels: Channels, store: _Store, runs: Sequence[BlockRun], holder: KvHolder
    ) -> None:
        address = store.address
        request = kv_pb2.PutRequest(
            store_epoch=address.epoch,
            model_fingerprint=self._model_fingerprint,
            layout=layout_to_wire(self._layout),
            block_format=FORMAT_VERSION,
            runs=runs_to_wire(runs),
            holder=holder_to_wire(holder),
        )
        try:
            async with channels.use(address.control_address) as channel:
                reply = await kv_pb2_grpc.KvTransferStub(channel).Put(request, timeout=self._limits.timeout_s)
        except grpc.aio.AioRpcError as error:
            self._dropped(sum(len(run.keys) for run in runs))
            self._leave_alone(store, error)
            return
        store.backoff_s = self._limits.first_backoff_s
        self.num_taken += reply.num_taken
        self.num_known += reply.num_known
        self._tell(reply.num_taken, "offered_and_taken")
        self._tell(reply.num_known, "offered_and_known")

    def _dropped(self, num_blocks: int) -> None:
        self.num_dropped += num_blocks
        self._tell(num_blocks, "offer_dropped")

    def _leave_alone(self, store: _Store, error: grpc.aio.AioRpcError) -> None:
        store.ready_at_s = asyncio.get_running_loop().time() + store.backoff_s
        log_event(
            _logger,
            "store_away",
            level=logging.WARNING,
            store=store.address.worker_id,
            status=error.code().name,
            detail=error.details(),
            retry_in_s=store.backoff_s,
        )
        store.backoff_s = min(2 * store.backoff_s, self._limits.last_backoff_s)


def _rendezvous(stores: Sequence[_Store], home: BlockKey) -> _Store:
    """The same store for the same chain wherever it is asked, as long as that store is there."""

    def weight(store: _Store) -> bytes:
        return blake2b(home + store.address.worker_id.encode(), digest_size=8).digest()

    return max(stores, key=weight)
