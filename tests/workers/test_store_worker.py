"""A store from its start to its end: who it is, what it takes, what it gives, and what it leaves."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

from control_plane.directory.memory import MemoryDirectory
from control_plane.directory.server import DirectoryServicer
from kvstore.blocks import FORMAT_VERSION, chain_keys, root_key
from kvstore.errors import TierUnusable
from kvstore.holdings import Holdings
from kvstore.store import BlockStore
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.tier import BlockRun, Tier
from protos import directory_pb2_grpc, kv_pb2, kv_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.workers.block_ends import serving
from tests.workers.handoff_ends import wait_until
from workers.block_wire import holder_to_wire, runs_to_wire
from workers.config import Role, WorkerConfig
from workers.drain import Drain
from workers.errors import PullRefused
from workers.fetch import BlockFetcher, FetchTimeouts
from workers.handoff_wire import layout_to_wire
from workers.identity import Identity
from workers.request import KvHolder
from workers.store_worker import StoreWorker, load_store_model

NUM_BLOCKS = 12


@contextlib.asynccontextmanager
async def running_store(checkpoint: Path, **settings: Any) -> AsyncIterator[Identity]:
    config = WorkerConfig(
        **{
            "role": Role.STORE, "worker_id": "store-0", "model_path": checkpoint, "model_name": "tiny",
            "memory_tier_bytes": 2**20, "disk_tier_bytes": 64 * 2**20,
        } | settings
    )  # fmt: skip
    stop = asyncio.Event()
    ready: asyncio.Future[Identity] = asyncio.get_running_loop().create_future()
    worker, drain = StoreWorker(config, load_store_model(config)), Drain(timeout_s=20.0)
    task = asyncio.create_task(worker.serve(stop=stop, drain=drain, on_ready=ready.set_result))
    await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    try:
        yield ready.result()
    finally:
        stop.set()
        await task


def _run(identity: Identity, *, cache_salt: str = "") -> BlockRun:
    """The same tokens for every tenant."""
    root = root_key(model_fingerprint=identity.fingerprint, cache_salt=cache_salt)
    keys = tuple(chain_keys(root, range(16 * NUM_BLOCKS)))
    return BlockRun(root=root, parent=root, first_position=0, keys=keys)


def _fetcher(identity: Identity) -> BlockFetcher:
    return BlockFetcher(
        model_fingerprint=identity.fingerprint, layout=identity.layout, profile_id=b"",
        timeouts=FetchTimeouts(total_s=20.0),
    )  # fmt: skip


async def test_a_store_says_what_it_is_and_computes_nothing(checkpoint: Path) -> None:
    async with (
        running_store(checkpoint) as identity,
        grpc.aio.insecure_channel(identity.control_address) as channel,
    ):
        stub = worker_pb2_grpc.WorkerStub(channel)
        described = await stub.Describe(worker_pb2.DescribeRequest(), timeout=5.0)
        assert described.role == worker_pb2.ROLE_STORE
        assert described.block_format == FORMAT_VERSION
        assert described.model.fingerprint == identity.fingerprint
        assert described.load.num_pages == described.load.num_free_pages > 0
        call = stub.Session(timeout=5.0)
        with pytest.raises(grpc.aio.AioRpcError, match="store-0 is a store") as error:
            await call.read()
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_store_has_the_fingerprint_of_the_workers_of_its_model(
    checkpoint: Path, start_worker: Any
) -> None:
    worker = await start_worker()
    async with running_store(checkpoint) as identity:
        assert identity.fingerprint == worker.identity.fingerprint
        assert identity.layout == worker.identity.layout


async def test_a_store_is_a_member_and_tells_what_it_holds(checkpoint: Path) -> None:
    directory = MemoryDirectory(ttl_s=2.0)
    server = grpc.aio.server()
    directory_pb2_grpc.add_DirectoryServicer_to_server(DirectoryServicer(directory, heartbeat_s=0.02), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with running_store(checkpoint, directory=address):
        await wait_until(lambda: len(directory.members()) == 1)
    assert directory.members() == ()
    await server.stop(None)


@contextlib.asynccontextmanager
async def _filled(
    identity: Identity, *, cache_salt: str = ""
) -> AsyncIterator[tuple[BlockStore, KvHolder, BlockRun]]:
    """A worker's tiers with random blocks of the store's model, from which can be pulled."""
    run = _run(identity, cache_salt=cache_salt)
    memory = MemoryTier(
        np.zeros(64 * identity.layout.block_bytes, np.uint8),
        block_bytes=identity.layout.block_bytes, policy="lru", holdings=Holdings(),
    )  # fmt: skip
    store = BlockStore(memory, disk=None)
    reservation = store.reserve(NUM_BLOCKS)
    assert reservation is not None
    with reservation:
        for slot in reservation.slots:
            store.arena_SX[slot] = slot + 1
        reservation.commit(run, slots=reservation.slots)
    async with serving(store, fingerprint=identity.fingerprint, layout=identity.layout) as holder:
        yield store, holder, run


async def _offer(identity: Identity, run: BlockRun, holder: KvHolder) -> kv_pb2.PutReply:
    async with grpc.aio.insecure_channel(identity.control_address) as channel:
        return await kv_pb2_grpc.KvTransferStub(channel).Put(
            kv_pb2.PutRequest(
                store_epoch=identity.epoch, model_fingerprint=identity.fingerprint,
                layout=layout_to_wire(identity.layout), block_format=FORMAT_VERSION,
                runs=runs_to_wire([run]), holder=holder_to_wire(holder),
            ),
            timeout=20.0,
        )  # fmt: skip


async def _pulled(identity: Identity, run: BlockRun) -> tuple[tuple[Tier, ...], bytes]:
    fetcher = _fetcher(identity)
    holder = KvHolder(
        worker_id=identity.worker_id, epoch=identity.epoch, control_address=identity.control_address,
        num_blocks=NUM_BLOCKS,
    )  # fmt: skip
    try:
        async with await fetcher.open(holder, run.keys) as fetch:
            await fetch.want(first_block=0, num_blocks=fetch.num_blocks, level=0)
            return fetch.tiers, bytes((await fetch.receive()).payload)
    finally:
        await fetcher.close()


async def test_what_is_offered_can_be_pulled_and_survives_a_restart(checkpoint: Path, tmp_path: Path) -> None:
    before = psutil.Process().num_fds()
    async with running_store(checkpoint, disk_tier_path=tmp_path) as identity:
        async with _filled(identity) as (store, holder, run):
            reply = await _offer(identity, run, holder)
            assert (reply.num_taken, reply.num_known) == (NUM_BLOCKS, 0)
            with await store.pin(run.keys) as pinned:
                expected = store.arena_SX[list(pinned.slots)].tobytes()
        tiers, payload = await _pulled(identity, run)
        assert tiers == (Tier.MEMORY,) * NUM_BLOCKS
        assert payload == expected

    async with running_store(checkpoint, disk_tier_path=tmp_path) as restarted:
        assert restarted.epoch != identity.epoch
        tiers, payload = await _pulled(restarted, run)
        assert tiers == (Tier.DISK,) * NUM_BLOCKS
        assert payload == expected
    await wait_until(lambda: psutil.Process().num_fds() <= before)


async def test_offers_under_way_at_the_deadline_of_its_drain_are_what_a_store_leaves(
    checkpoint: Path,
) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    silent.setblocking(False)
    address = f"127.0.0.1:{silent.getsockname()[1]}"
    holder = KvHolder(worker_id="silent", epoch=1, control_address=address, num_blocks=NUM_BLOCKS)
    async with running_store(checkpoint) as identity:
        offer = asyncio.create_task(_offer(identity, _run(identity), holder))
        asked, _ = await asyncio.get_running_loop().sock_accept(silent)
        async with grpc.aio.insecure_channel(identity.control_address) as channel:
            request = worker_pb2.DrainRequest(timeout_s=0.01, until_stopped=True)
            left = await worker_pb2_grpc.WorkerStub(channel).Drain(request, timeout=10.0)
        assert left == worker_pb2.DrainReply(num_blocks=NUM_BLOCKS)
        await asyncio.gather(offer, return_exceptions=True)
    for end in (asked, silent):
        end.close()


async def test_a_tenant_gets_its_own_kv_from_a_store_and_nothing_of_another_one(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Both send the same tokens, and only the store still has what was computed for one of them."""
    async with running_store(checkpoint, disk_tier_path=tmp_path) as identity:
        async with _filled(identity, cache_salt="a") as (store, holder, of_a):
            assert (await _offer(identity, of_a, holder)).num_taken == NUM_BLOCKS
            with await store.pin(of_a.keys) as pinned:
                expected = store.arena_SX[list(pinned.slots)].tobytes()
        await _only_a_is_served(identity, of_a, expected, tier=Tier.MEMORY)
    async with running_store(checkpoint, disk_tier_path=tmp_path) as restarted:
        await _only_a_is_served(restarted, of_a, expected, tier=Tier.DISK)


async def _only_a_is_served(identity: Identity, of_a: BlockRun, expected: bytes, *, tier: Tier) -> None:
    for cache_salt in ("b", ""):
        with pytest.raises(PullRefused, match="is not held here"):
            await _pulled(identity, _run(identity, cache_salt=cache_salt))
    assert await _pulled(identity, of_a) == ((tier,) * NUM_BLOCKS, expected)


async def test_a_disk_that_cannot_be_had_refuses_the_start(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a-file").touch()
    with pytest.raises(TierUnusable, match="a-file"):
        async with running_store(checkpoint, disk_tier_path=tmp_path / "a-file"):
            pass
    with pytest.raises(TierUnusable, match="NO_SUCH_KEY"):
        async with running_store(checkpoint, disk_tier_path=tmp_path, disk_tier_key="env:NO_SUCH_KEY"):
            pass
    with pytest.raises(TierUnusable, match="needs at least"):
        async with running_store(checkpoint, disk_tier_path=tmp_path, disk_tier_bytes=1):
            pass
