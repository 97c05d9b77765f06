"""Both ends of a pull by key with real servers and sockets, and tiers of random blocks."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import grpc
import numpy as np
from prometheus_client import CollectorRegistry

from kvstore.addresses import TcpAddress
from kvstore.blocks import BlockKey, chain_keys, root_key
from kvstore.codec.codec import KvCodec
from kvstore.holdings import Holdings
from kvstore.layout import KvLayout
from kvstore.listener import Listener
from kvstore.store import BlockStore
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.tier import BlockRun
from protos import kv_pb2_grpc
from tests.relay import Relay
from tests.workers.handoff_ends import connections_of, port_of
from workers.agreement import SourceIdentity
from workers.block_exports import BlockExportLimits, BlockExports
from workers.block_server import BlockService
from workers.fetch import BlockFetcher, FetchTimeouts
from workers.handoff_server import KvTransferService
from workers.kv_metrics import KvMetrics
from workers.offer_intake import OfferIntake
from workers.request import KvHolder
from workers.tickets import TicketDesk

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32")
FINGERPRINT = b"m" * 32
EPOCH = 77
TIMEOUTS = FetchTimeouts(total_s=20.0, handshake_s=5.0, connect_s=5.0, idle_s=5.0)
SOON_S = 10.0


def chain(num_blocks: int, *, first_token: int = 0, cache_salt: str = "") -> BlockRun:
    """The run of a prompt of counting tokens."""
    root = root_key(model_fingerprint=FINGERPRINT, cache_salt=cache_salt)
    tokens = range(first_token, first_token + 16 * num_blocks)
    return BlockRun(root=root, parent=root, first_position=0, keys=tuple(chain_keys(root, tokens)))


def bytes_of(key: BlockKey) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """What a block holds follows from its key, so that anybody can tell whether it is the right one."""
    seed = int.from_bytes(key[:8], "little")
    return np.random.default_rng(seed).standard_normal(LAYOUT.block_bytes // 4, np.float32).view(np.uint8)


def make_store(*, num_slots: int = 64, disk: DiskTier | None = None) -> BlockStore:
    memory = MemoryTier(
        np.zeros(num_slots * LAYOUT.block_bytes, np.uint8),
        block_bytes=LAYOUT.block_bytes,
        policy="lru",
        holdings=Holdings(),
    )
    return BlockStore(memory, disk=disk)


def fill(store: BlockStore, run: BlockRun) -> None:
    reservation = store.reserve(len(run.keys))
    assert reservation is not None
    with reservation:
        for slot, key in zip(reservation.slots, run.keys, strict=True):
            store.arena_SX[slot] = bytes_of(key)
        reservation.commit(run, slots=reservation.slots)


def assert_holds(store: BlockStore, keys: Sequence[BlockKey], slots: Sequence[int]) -> None:
    for slot, key in zip(slots, keys, strict=True):
        assert np.array_equal(store.arena_SX[slot], bytes_of(key)), f"slot {slot} does not hold {key.hex()}"


def make_fetcher(
    *, fingerprint: bytes = FINGERPRINT, layout: KvLayout = LAYOUT, profile_id: bytes = b"",
    timeouts: FetchTimeouts = TIMEOUTS,
) -> BlockFetcher:  # fmt: skip
    return BlockFetcher(
        model_fingerprint=fingerprint, layout=layout, profile_id=profile_id, timeouts=timeouts
    )


@contextlib.asynccontextmanager
async def serving(
    store: BlockStore, *, fingerprint: bytes, layout: KvLayout, relay: Relay | None = None
) -> AsyncIterator[KvHolder]:
    """Pulls by key from `store`, whatever its model; through `relay`, if there is one."""
    metrics = KvMetrics(CollectorRegistry(), model_name="tiny")
    exports = BlockExports(store, codec=KvCodec(layout, profile=None), metrics=metrics)
    listener = Listener(TicketDesk([exports]).serve, max_connections=8, idle_timeout_s=SOON_S)
    await listener.start(TcpAddress(host="127.0.0.1", port=0))
    data_address = str(listener.address if relay is None else await relay.start(listener.address))
    identity = SourceIdentity(
        epoch=EPOCH, model_fingerprint=fingerprint, layout=layout, data_address=data_address
    )
    blocks = BlockService(store, exports=exports, metrics=metrics)
    server = grpc.aio.server()
    kv_pb2_grpc.add_KvTransferServicer_to_server(KvTransferService(identity=identity, blocks=blocks), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield KvHolder(worker_id="peer", epoch=EPOCH, control_address=address, num_blocks=0)
    finally:
        await server.stop(None)
        await listener.close()
        exports.close()


class Peer:
    """What a worker or a store has around its tiers."""

    def __init__(self, *, limits: BlockExportLimits, num_slots: int, takes_offers: bool) -> None:
        self.store = make_store(num_slots=num_slots)
        self.codec = KvCodec(LAYOUT, profile=None)
        self.registry = CollectorRegistry()
        self.metrics = KvMetrics(self.registry, model_name="tiny")
        self.exports = BlockExports(self.store, codec=self.codec, metrics=self.metrics, limits=limits)
        self.fetcher = make_fetcher()
        self.intake = OfferIntake(self.store, fetcher=self.fetcher, max_offers=2) if takes_offers else None
        self.listener = Listener(TicketDesk([self.exports]).serve, max_connections=8, idle_timeout_s=SOON_S)
        self.server = grpc.aio.server()
        self.control_address = ""

    async def start(self) -> None:
        await self.listener.start(TcpAddress(host="127.0.0.1", port=0))
        blocks = BlockService(self.store, exports=self.exports, metrics=self.metrics, intake=self.intake)
        identity = SourceIdentity(
            epoch=EPOCH,
            model_fingerprint=FINGERPRINT,
            layout=LAYOUT,
            data_address=str(self.listener.address),
        )
        service = KvTransferService(identity=identity, blocks=blocks)
        kv_pb2_grpc.add_KvTransferServicer_to_server(service, self.server)
        self.control_address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()

    async def close(self) -> None:
        await self.server.stop(None)
        await self.listener.close()
        await self.fetcher.close()
        self.exports.close()
        if self.intake is not None:
            self.intake.close()
        await self.store.close()

    def holder(self, *, epoch: int = EPOCH) -> KvHolder:
        return KvHolder(worker_id="peer", epoch=epoch, control_address=self.control_address, num_blocks=0)

    def num_mismatches(self, what: str) -> float:
        return self._count("penstock_kv_mismatches_total", what=what)

    def num_coded(self, outcome: str) -> float:
        return self._count("penstock_kv_coded_cache_chunks_total", outcome=outcome)

    def _count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, {"model_name": "tiny", **labels}) or 0.0


@contextlib.asynccontextmanager
async def running_peer(
    *, limits: BlockExportLimits | None = None, num_slots: int = 64, takes_offers: bool = False
) -> AsyncIterator[Peer]:
    """Asserts in the end that nothing of it is left, and that nothing stayed pinned."""
    peer = Peer(limits=limits or BlockExportLimits(), num_slots=num_slots, takes_offers=takes_offers)
    await peer.start()
    try:
        yield peer
    finally:
        await peer.close()
    assert peer.listener.num_connections == 0
    assert connections_of(port_of(peer.listener)) == []
    await asyncio.sleep(0)
    reservation = peer.store.reserve(num_slots)
    assert reservation is not None, "blocks are still pinned or reserved"
    reservation.close()
