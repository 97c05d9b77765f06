"""KV that was computed once is loaded and not computed again: from memory, disk, another worker and a store.

Wherever it comes from, the tokens are those of a worker that computed everything itself, and no tenant ever gets
another's.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from control_plane.directory.member import WorkerId
from control_plane.directory.overlap import NO_OVERLAP
from kvstore.blocks import chain_keys, root_key
from kvstore.store import BlockStore
from kvstore.tiers.tier import Tier
from protos import kv_pb2, kv_pb2_grpc, worker_pb2
from tests.workers.conftest import OpenSession, RunningWorker, Session, StartWorker
from tests.workers.handoff_ends import wait_until
from tests.workers.test_membership import Directory
from tests.workers.test_store_worker import running_store
from workers.identity import Identity
from workers.offers import StoreAddress

# 400 tokens: 24 full blocks may be loaded, the last token is always computed.
PROMPT = [(7 * i) % 250 + 3 for i in range(400)]
NUM_LOADABLE_TOKENS = 384
STORE = WorkerId("store-0")
OUR_THREADS = ("encode", "load", "write-behind", "engine", "disk", "intake")
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
# Of so many pages an eighth may be on its way down at a time, which is more than the prompt has.
PATIENT: dict[str, Any] = {"ttft_objective_s": 30.0, "max_level": 0, "num_pages": 512}


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    await wait_until(lambda: asyncio.all_tasks() <= before | {asyncio.current_task()})


@pytest.fixture
async def expected(start_worker: StartWorker, open_session: OpenSession) -> list[int]:
    """What a worker without tiers answers."""
    running = await start_worker(memory_tier_bytes=0)
    answer = await (await (await open_session(running)).submit("r", PROMPT, **GREEDY)).wait()
    await running.end()
    return list(answer.token_ids)


def _store(running: RunningWorker) -> BlockStore:
    assert running.worker.tiers is not None
    return running.worker.tiers.store


def _num_held(store: BlockStore, identity: Identity, *, cache_salt: str = "") -> int:
    root = root_key(model_fingerprint=identity.fingerprint, cache_salt=cache_salt)
    return len(store.lookup(list(chain_keys(root, PROMPT))))


async def _first_turn(running: RunningWorker, session: Session, **fields: Any) -> list[int]:
    """Computes the prompt; when it returns the tiers hold its blocks."""
    answer = await (await session.submit("first", PROMPT, **(GREEDY | fields))).wait()
    await running.settled()
    salt = fields.get("cache_salt", "")
    await wait_until(lambda: _num_held(_store(running), running.identity, cache_salt=salt) == 25)
    return list(answer.token_ids)


async def _forget_device(running: RunningWorker) -> None:
    running.worker.state.drop(None)
    assert running.worker.state.num_cached_blocks(_keys(running)) == 0


def _keys(running: RunningWorker) -> list[Any]:
    root = root_key(model_fingerprint=running.identity.fingerprint)
    return list(chain_keys(root, PROMPT))


def _holder(identity: Identity, num_blocks: int = 25) -> worker_pb2.KvHolder:
    return worker_pb2.KvHolder(
        worker_id=identity.worker_id, epoch=identity.epoch, control_address=identity.control_address,
        num_blocks=num_blocks,
    )  # fmt: skip


def _num_loaded(running: RunningWorker, tier: Tier) -> float:
    labels = {"model_name": "tiny", "tier": tier.name.lower()}
    return running.worker.metrics.registry.get_sample_value("penstock_kv_loaded_blocks_total", labels) or 0.0


async def test_what_left_the_device_comes_back_from_memory(
    start_worker: StartWorker, open_session: OpenSession, expected: list[int]
) -> None:
    running = await start_worker(**PATIENT)
    session = await open_session(running)
    assert await _first_turn(running, session) == expected
    await _forget_device(running)
    answer = await (await session.submit("second", PROMPT, **GREEDY)).wait()
    assert answer.token_ids == expected
    assert _num_loaded(running, Tier.MEMORY) > 0
    assert 0 < answer.last.num_cached_tokens <= NUM_LOADABLE_TOKENS
    await running.settled()

    async with grpc.aio.insecure_channel(running.identity.control_address) as channel:
        stub = kv_pb2_grpc.KvTransferStub(channel)
        described = await stub.DescribeTiers(kv_pb2.DescribeTiersRequest(num_prefixes=3), timeout=5.0)
        tiers = {tier.name: tier for tier in described.tiers}
        assert list(tiers) == ["device", "memory", "peer"]
        assert tiers["device"].num_blocks == tiers["memory"].num_blocks == 25
        assert tiers["memory"].num_hit_blocks == 24
        assert described.num_lookup_blocks == 48
        dropped = await stub.Drop(kv_pb2.DropRequest(source_epoch=running.identity.epoch), timeout=5.0)
        assert dropped.num_blocks == 50
    assert running.worker.state.num_cached_pages == 0
    assert _num_held(_store(running), running.identity) == 0


async def test_after_a_restart_it_comes_back_from_disk(
    start_worker: StartWorker, open_session: OpenSession, expected: list[int], tmp_path: Path
) -> None:
    settings: dict[str, Any] = PATIENT | {"disk_tier_path": tmp_path, "disk_tier_bytes": 64 * 2**20}
    before = await start_worker(**settings)
    assert await _first_turn(before, await open_session(before)) == expected
    await before.end()

    after = await start_worker(**settings)
    assert _num_held(_store(after), after.identity) == 25
    session = await open_session(after)
    answer = await (await session.submit("second", PROMPT, **GREEDY)).wait()
    assert answer.token_ids == expected
    assert _num_loaded(after, Tier.DISK) > 0
    assert answer.last.num_cached_tokens > 0
    await after.settled()
    await after.end()


async def test_another_worker_gives_it_when_it_is_named(
    start_worker: StartWorker, open_session: OpenSession, expected: list[int]
) -> None:
    first, second = await start_worker(**PATIENT), await start_worker(**PATIENT)
    await _first_turn(first, await open_session(first))
    session = await open_session(second)
    answer = await (
        await session.submit("second", PROMPT, kv_holders=[_holder(first.identity)], **GREEDY)
    ).wait()
    assert answer.token_ids == expected
    assert _num_loaded(second, Tier.PEER) > 0
    assert answer.last.num_cached_tokens > 0
    await second.settled()
    await first.settled()


async def test_a_store_gives_what_a_worker_that_is_gone_had_computed(
    checkpoint: Path, start_worker: StartWorker, open_session: OpenSession, expected: list[int]
) -> None:
    directory = Directory()
    await directory.start()
    async with running_store(checkpoint, directory=directory.address) as store:
        await directory.until(lambda: len(directory.memory.members()) == 1)
        first = await start_worker(directory=directory.address, **PATIENT)
        offers = first.worker.offers
        await wait_until(lambda: offers.num_stores == 1)
        await _first_turn(first, await open_session(first))
        await wait_until(lambda: offers.num_taken >= 25)
        await directory.until(
            lambda: directory.memory.blocks.overlaps(_keys(first)).get(STORE, NO_OVERLAP).num_blocks == 25
        )
        await first.end()

        second = await start_worker(**PATIENT)
        session = await open_session(second)
        answer = await (await session.submit("second", PROMPT, kv_holders=[_holder(store)], **GREEDY)).wait()
        assert answer.token_ids == expected
        assert _num_loaded(second, Tier.PEER) > 0
        await second.settled()
    await directory.stop()


def _address(store: Identity) -> StoreAddress:
    return StoreAddress(worker_id=store.worker_id, epoch=store.epoch, control_address=store.control_address)


# Tenants.


async def test_no_tenant_ever_gets_what_another_computed(
    checkpoint: Path,
    start_worker: StartWorker,
    open_session: OpenSession,
    expected: list[int],
    tmp_path: Path,
) -> None:
    """The same tokens, another salt: from the device, memory, disk, a peer and a store nothing comes."""
    async with running_store(checkpoint) as store:
        settings: dict[str, Any] = PATIENT | {"disk_tier_path": tmp_path, "disk_tier_bytes": 64 * 2**20}
        first = await start_worker(**settings)
        first.worker.offers.set_stores([_address(store)])
        session = await open_session(first)
        await _first_turn(first, session, cache_salt="tenant A")
        await wait_until(lambda: first.worker.offers.num_taken >= 25)
        second = await start_worker(**PATIENT)
        holders = [_holder(first.identity), _holder(store)]
        for number, running in enumerate((first, second)):
            theirs = await open_session(running)
            # One more tenant each time: what tenant B computed on the first worker is its own on the second.
            submitted = await theirs.submit(
                f"b{number}", PROMPT, cache_salt=f"tenant B{number}", kv_holders=holders, **GREEDY
            )
            answer = await submitted.wait()
            assert answer.token_ids == expected
            assert answer.last.num_cached_tokens == 0
            assert all(_num_loaded(running, tier) == 0 for tier in Tier)
            await running.settled()
        # Not because nothing was there.
        theirs = await open_session(second)
        answer = await (
            await theirs.submit("a", PROMPT, cache_salt="tenant A", kv_holders=holders, **GREEDY)
        ).wait()
        assert answer.token_ids == expected
        assert _num_loaded(second, Tier.PEER) > 0
        await second.settled()


# Faults.


@pytest.mark.parametrize(
    "holder",
    [
        worker_pb2.KvHolder(worker_id="gone", epoch=1, control_address="127.0.0.1:1", num_blocks=25),
        worker_pb2.KvHolder(worker_id="nonsense", epoch=1, control_address="no such host", num_blocks=9),
    ],
)
async def test_a_hint_that_leads_nowhere_costs_no_token(
    start_worker: StartWorker, open_session: OpenSession, expected: list[int], holder: worker_pb2.KvHolder
) -> None:
    running = await start_worker(**PATIENT)
    session = await open_session(running)
    answer = await (await session.submit("r", PROMPT, kv_holders=[holder], **GREEDY)).wait()
    assert answer.token_ids == expected
    await running.settled()


async def test_a_peer_of_another_incarnation_costs_no_token(
    start_worker: StartWorker, open_session: OpenSession, expected: list[int]
) -> None:
    first, second = await start_worker(**PATIENT), await start_worker(**PATIENT)
    await _first_turn(first, await open_session(first))
    holder = _holder(first.identity)
    holder.epoch += 1
    session = await open_session(second)
    answer = await (await session.submit("r", PROMPT, kv_holders=[holder], **GREEDY)).wait()
    assert answer.token_ids == expected
    await second.settled()


async def test_a_peer_that_ends_while_others_pull_costs_no_token(
    start_worker: StartWorker, open_session: OpenSession, expected: list[int]
) -> None:
    first, second = await start_worker(**PATIENT), await start_worker(**PATIENT)
    await _first_turn(first, await open_session(first))
    session = await open_session(second)
    answers = [
        await session.submit(f"r{number}", PROMPT, kv_holders=[_holder(first.identity)], **GREEDY)
        for number in range(8)
    ]
    await first.end()
    for answer in answers:
        await answer.wait()
        assert answer.token_ids == expected
    await second.settled()


async def test_a_peer_killed_while_others_pull_costs_no_token(
    start_process: Any,
    start_worker: StartWorker,
    open_session: OpenSession,
    connect: Any,
    expected: list[int],
) -> None:
    process = await start_process(num_pages=512)
    peer = await process.ready()
    to_peer = connect(peer)
    await to_peer.open()
    to_peer.listen()
    await (await to_peer.submit("first", PROMPT, **GREEDY)).wait()
    running = await start_worker(**PATIENT)
    session = await open_session(running)
    answers = [
        await session.submit(f"r{number}", PROMPT, kv_holders=[_holder(peer)], **GREEDY)
        for number in range(4)
    ]
    process.kill()
    await process.ended()
    for answer in answers:
        await answer.wait()
        assert answer.token_ids == expected
    await running.settled()
    assert running.worker.state.num_pinned_pages == 0


async def test_requests_aborted_at_any_moment_of_a_load_leave_nothing(
    start_worker: StartWorker, open_session: OpenSession, expected: list[int], tmp_path: Path
) -> None:
    settings: dict[str, Any] = PATIENT | {"disk_tier_path": tmp_path, "disk_tier_bytes": 64 * 2**20}
    first, second = await start_worker(**settings), await start_worker(**PATIENT)
    session = await open_session(first)
    await _first_turn(first, session)
    theirs = await open_session(second)
    for number in range(12):
        await _forget_device(first)
        ours = await session.submit(f"ours{number}", PROMPT, **GREEDY)
        other = await theirs.submit(f"o{number}", PROMPT, kv_holders=[_holder(first.identity)], **GREEDY)
        for _ in range(3 * number):
            await asyncio.sleep(0)
        await session.abort(f"ours{number}")
        await theirs.abort(f"o{number}")
        await ours.wait()
        await other.wait()
        second.worker.state.drop(None)
        await _store(second).drop(None)
    for running in (first, second):
        await running.settled()
        assert running.worker.state.num_pinned_pages == 0
        store = _store(running)

        def are_all_free(store: BlockStore = store) -> bool:
            reservation = store.reserve(store.arena_SX.shape[0])
            if reservation is None:
                return False
            reservation.close()
            return True

        # What is being written to disk is pinned until it is there.
        await wait_until(are_all_free)


async def test_without_tiers_nothing_of_them_is_there(
    start_worker: StartWorker, open_session: OpenSession, expected: list[int]
) -> None:
    running = await start_worker(memory_tier_bytes=0)
    assert running.worker.tiers is None
    session = await open_session(running)
    holder = worker_pb2.KvHolder(worker_id="x", epoch=1, control_address="127.0.0.1:1", num_blocks=25)
    answer = await (await session.submit("r", PROMPT, kv_holders=[holder], **GREEDY)).wait()
    assert answer.token_ids == expected


async def test_a_worker_that_ends_leaves_no_file_no_thread_and_no_task(
    start_worker: StartWorker, open_session: OpenSession, expected: list[int], tmp_path: Path
) -> None:
    process = psutil.Process()
    settings: dict[str, Any] = PATIENT | {"disk_tier_path": tmp_path, "disk_tier_bytes": 64 * 2**20}
    # The first one makes what stays for good: gRPC's threads and descriptors.
    counts = []
    for _ in range(3):
        running = await start_worker(**settings)
        session = await open_session(running)
        await (await session.submit("r", PROMPT, **GREEDY)).wait()
        await session.close()
        await running.end()
        counts.append(process.num_fds())
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(OUR_THREADS)]
    await wait_until(lambda: process.num_fds() <= counts[0])


async def test_a_worker_that_drains_hands_what_only_it_has_to_the_others_of_its_pool(
    start_worker: StartWorker, open_session: OpenSession, expected: list[int]
) -> None:
    directory = Directory()
    await directory.start()
    leaving = await start_worker(directory=directory.address, **PATIENT)
    assert await _first_turn(leaving, await open_session(leaving)) == expected
    staying = await start_worker(directory=directory.address, **PATIENT)
    await directory.until(lambda: len(directory.memory.members()) == 2)
    leaving.drain.begin()
    await leaving.task
    assert leaving.drain.left.is_nothing
    assert _num_held(_store(staying), staying.identity) == 25
    session = await open_session(staying)
    answer = await (await session.submit("second", PROMPT, **GREEDY)).wait()
    assert answer.token_ids == expected
    assert _num_loaded(staying, Tier.MEMORY) > 0
    await staying.settled()
    await directory.stop()


async def test_what_is_handed_on_is_a_quarter_of_memory_and_the_most_valuable_comes_last(
    start_worker: StartWorker, open_session: OpenSession
) -> None:
    directory = Directory()
    await directory.start()
    staying = await start_worker(directory=directory.address, **PATIENT)
    memory_bytes = 4 * 26 * staying.identity.layout.block_bytes
    leaving = await start_worker(directory=directory.address, memory_tier_bytes=memory_bytes, **PATIENT)
    session = await open_session(leaving)
    for cache_salt in ("older", "newer"):
        await _first_turn(leaving, session, cache_salt=cache_salt)
    await directory.until(lambda: len(directory.memory.members()) == 2)
    leaving.drain.begin()
    await leaving.task
    held = _store(staying)
    assert _num_held(held, staying.identity, cache_salt="older") == 1
    assert _num_held(held, staying.identity, cache_salt="newer") == 25
    newer = root_key(model_fingerprint=staying.identity.fingerprint, cache_salt="newer")
    assert [run.root for run in held.most_valuable(max_blocks=25)] == [newer]
    await directory.stop()


async def test_a_worker_without_a_directory_keeps_nothing_for_stores(
    start_worker: StartWorker, open_session: OpenSession
) -> None:
    running = await start_worker(**PATIENT)
    await _first_turn(running, await open_session(running))
    assert running.worker.offers.num_waiting_blocks == 0


async def test_a_store_that_came_late_gets_what_a_worker_holds_when_that_drains(
    start_worker: StartWorker, open_session: OpenSession, checkpoint: Path
) -> None:
    directory = Directory()
    await directory.start()
    leaving = await start_worker(directory=directory.address, **PATIENT)
    await _first_turn(leaving, await open_session(leaving))
    async with running_store(checkpoint, directory=directory.address) as store:
        await directory.until(lambda: len(directory.memory.members()) == 2)
        leaving.drain.begin()
        await leaving.task
        await directory.until(
            lambda: directory.memory.blocks.overlaps(_keys(leaving)).get(STORE, NO_OVERLAP).num_blocks == 25
        )
        assert store.worker_id == STORE
    await directory.stop()
