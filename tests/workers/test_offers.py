"""Workers offer what they hold, stores pull it; and what happens when either does not play along."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence

import grpc
import pytest

from kvstore.blocks import FORMAT_VERSION, BlockKey
from kvstore.tiers.tier import BlockRun, Tier
from protos import kv_pb2, kv_pb2_grpc
from tests.workers.block_ends import (
    EPOCH,
    FINGERPRINT,
    LAYOUT,
    TIMEOUTS,
    Peer,
    assert_holds,
    chain,
    fill,
    make_fetcher,
    make_store,
    running_peer,
)
from tests.workers.handoff_ends import wait_until
from workers.block_wire import holder_to_wire, runs_to_wire
from workers.fetch import BlockFetcher, Fetch
from workers.handoff_wire import layout_to_wire
from workers.offer_intake import MAX_WAITING_OFFERS, OfferIntake, TooManyOffers
from workers.offers import OfferLimits, Offers, StoreAddress
from workers.request import KvHolder

RUN = chain(40)


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    await wait_until(lambda: asyncio.all_tasks() <= before | {asyncio.current_task()})


@pytest.fixture
async def worker() -> AsyncIterator[Peer]:
    async with running_peer() as made:
        fill(made.store, RUN)
        yield made


@contextlib.asynccontextmanager
async def offering(
    worker: Peer, stores: Sequence[Peer] | None, limits: OfferLimits | None = None
) -> AsyncIterator[Offers]:
    """`stores` are what the worker has heard of; None if it has heard nothing yet."""
    offers = Offers(
        model_fingerprint=FINGERPRINT,
        layout=LAYOUT,
        tell=lambda num_blocks, outcome: None,
        limits=limits or OfferLimits(),
    )
    if stores is not None:
        offers.set_stores([address(f"store-{number}", store) for number, store in enumerate(stores)])
    task = asyncio.create_task(offers.run(worker.holder()))
    try:
        yield offers
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def address(worker_id: str, peer: Peer) -> StoreAddress:
    return StoreAddress(worker_id=worker_id, epoch=EPOCH, control_address=peer.control_address)


async def assert_store_holds(store: Peer, run: BlockRun) -> None:
    with await store.store.pin(run.keys) as pinned:
        assert len(pinned.slots) == len(run.keys)
        assert_holds(store.store, run.keys, pinned.slots)


def num_held(peer: Peer, run: BlockRun) -> int:
    return len(peer.store.lookup(run.keys))


async def test_a_store_pulls_what_it_is_offered(worker: Peer) -> None:
    async with running_peer(takes_offers=True) as store, offering(worker, [store]) as offers:
        offers.offer(RUN.part(0, 17))
        offers.offer(RUN.part(17, 40))
        await wait_until(lambda: offers.num_taken == 40)
        await assert_store_holds(store, RUN)
        offers.offer(RUN)
        await wait_until(lambda: offers.num_known == 40)
        assert (offers.num_taken, offers.num_dropped, offers.num_waiting_blocks) == (40, 0, 0)


async def test_what_is_computed_before_the_first_news_of_stores_is_offered_with_it(worker: Peer) -> None:
    async with running_peer(takes_offers=True) as store, offering(worker, None) as offers:
        offers.offer(RUN)
        assert offers.num_waiting_blocks == 40
        offers.set_stores([address("s", store)])
        await wait_until(lambda: offers.num_taken == 40)


async def test_nothing_waits_where_there_is_no_store(worker: Peer) -> None:
    async with offering(worker, None) as offers:
        offers.offer(RUN)
        offers.set_stores([])
        assert offers.num_waiting_blocks == 0
        offers.offer(RUN)
        assert offers.num_waiting_blocks == 0


async def test_a_store_takes_no_kv_that_is_no_number(worker: Peer) -> None:
    with await worker.store.pin(RUN.keys) as pinned:
        worker.store.arena_SX[pinned.slots[20]] = 0xFF  # NaN, whatever the dtype
    async with running_peer(takes_offers=True) as store, offering(worker, [store]) as offers:
        offers.offer(RUN.part(0, 10))
        offers.offer(RUN.part(10, 30))
        await offers.settled()
        assert num_held(store, RUN) == 10


async def test_a_chain_longer_than_an_offer_goes_in_several(worker: Peer) -> None:
    limits = OfferLimits(max_blocks_per_offer=16)
    async with running_peer(takes_offers=True) as store, offering(worker, [store], limits) as offers:
        offers.offer(RUN)
        assert offers.num_unsettled_blocks == 40
        await wait_until(lambda: offers.num_taken == 40)
        await offers.settled()
        assert offers.num_unsettled_blocks == 0
        await assert_store_holds(store, RUN)


async def test_a_store_pulls_only_the_blocks_it_lacks(worker: Peer) -> None:
    async with running_peer(takes_offers=True) as store, offering(worker, [store]) as offers:
        fill(store.store, RUN.part(0, 10))
        offers.offer(RUN)
        await wait_until(lambda: offers.num_taken + offers.num_known == 40)
        assert offers.num_known == 10
        await assert_store_holds(store, RUN)


async def test_all_runs_of_a_conversation_land_on_one_store(worker: Peer) -> None:
    async with contextlib.AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(running_peer(takes_offers=True)) for _ in range(3)]
        offers = await stack.enter_async_context(offering(worker, stores))
        for start in range(0, 40, 8):
            offers.offer(RUN.part(start, start + 8))
            await wait_until(lambda: offers.num_waiting_blocks == 0)
        await wait_until(lambda: offers.num_taken == 40)
        assert sorted(num_held(store, RUN) for store in stores) == [0, 0, 40]


async def test_different_conversations_spread_over_the_stores(worker: Peer) -> None:
    chains = [chain(1, first_token=1000 + number) for number in range(20)]
    for run in chains:
        fill(worker.store, run)
    async with contextlib.AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(running_peer(takes_offers=True)) for _ in range(2)]
        offers = await stack.enter_async_context(offering(worker, stores))
        for run in chains:
            offers.offer(run)
        await wait_until(lambda: offers.num_taken == 20)
        held = [sum(num_held(store, run) for run in chains) for store in stores]
        assert min(held) >= 3
        assert sum(held) == 20


async def test_without_stores_nothing_waits(worker: Peer) -> None:
    async with offering(worker, []) as offers:
        offers.offer(RUN)
        assert offers.num_waiting_blocks == 0


async def test_a_store_that_is_away_costs_its_offers_and_is_found_again(worker: Peer) -> None:
    limits = OfferLimits(first_backoff_s=0.05, last_backoff_s=0.05, timeout_s=5.0)
    async with running_peer(takes_offers=True) as store, offering(worker, [], limits) as offers:
        gone = StoreAddress(worker_id="s", epoch=EPOCH, control_address="127.0.0.1:1")
        offers.set_stores([gone])
        offers.offer(RUN.part(0, 10))
        await wait_until(lambda: offers.num_dropped == 10)
        offers.offer(RUN.part(10, 20))
        offers.set_stores([address("s", store)])
        await wait_until(lambda: offers.num_taken == 10)


async def test_the_oldest_offers_are_dropped_when_too_many_wait(worker: Peer) -> None:
    told: list[tuple[int, str]] = []
    limits = OfferLimits(max_waiting_blocks=16)
    offers = Offers(
        model_fingerprint=FINGERPRINT,
        layout=LAYOUT,
        tell=lambda num_blocks, outcome: told.append((num_blocks, outcome)),
        limits=limits,
    )
    offers.set_stores([StoreAddress(worker_id="s", epoch=1, control_address="127.0.0.1:1")])
    for start in range(0, 40, 8):
        offers.offer(RUN.part(start, start + 8))
    assert (offers.num_waiting_blocks, offers.num_dropped) == (16, 24)
    assert told == [(8, "offer_dropped")] * 3


async def test_what_is_offered_once_more_is_waited_for_and_counted_apart(worker: Peer) -> None:
    async with running_peer(takes_offers=True) as store, offering(worker, [store]) as offers:
        offers.offer(RUN.part(0, 10))
        offers.offer(RUN.part(10, 40), is_extra=True)
        assert (offers.num_unsettled_blocks, offers.num_unsettled_extra_blocks) == (10, 30)
        await offers.settled()
        assert (offers.num_unsettled_blocks, offers.num_unsettled_extra_blocks) == (0, 0)
        await assert_store_holds(store, RUN)


async def test_an_offerer_that_is_gone_costs_a_store_nothing() -> None:
    async with running_peer(takes_offers=True) as store:
        assert store.intake is not None
        gone = KvHolder(worker_id="gone", epoch=1, control_address="127.0.0.1:1", num_blocks=0)
        taken = await store.intake.take([RUN], gone)
        assert (taken.num_taken, taken.num_known) == (0, 0)


async def test_an_offerer_that_is_away_is_not_asked_run_after_run() -> None:
    asked: list[BlockRun] = []

    class Away(BlockFetcher):
        async def open(self, holder: KvHolder, keys: Sequence[BlockKey]) -> Fetch:
            asked.append(RUN)
            return await super().open(holder, keys)

    fetcher = Away(model_fingerprint=FINGERPRINT, layout=LAYOUT, profile_id=b"", timeouts=TIMEOUTS)
    intake = OfferIntake(make_store(), fetcher=fetcher, max_offers=1)
    gone = KvHolder(worker_id="gone", epoch=1, control_address="127.0.0.1:1", num_blocks=0)
    await intake.take([RUN.part(start, start + 4) for start in range(0, 40, 4)], gone)
    assert len(asked) == 1
    await fetcher.close()
    intake.close()


async def test_an_offerer_that_never_answers_does_not_keep_others_from_their_turn(worker: Peer) -> None:
    store, fetcher = make_store(), make_fetcher()
    intake = OfferIntake(store, fetcher=fetcher, max_offers=1, timeout_s=0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        holder = KvHolder(worker_id="silent", epoch=1, control_address=address, num_blocks=0)
        lost, taken = await asyncio.gather(intake.take([RUN], holder), intake.take([RUN], worker.holder()))
    assert (lost.num_taken, taken.num_taken) == (0, 40)
    await fetcher.close()
    intake.close()


async def test_no_more_offers_wait_than_a_store_can_remember(worker: Peer) -> None:
    store, fetcher = make_store(), make_fetcher()
    intake = OfferIntake(store, fetcher=fetcher, max_offers=1)
    offers = [asyncio.create_task(intake.take([RUN], worker.holder())) for _ in range(MAX_WAITING_OFFERS + 2)]
    done, rest = await asyncio.wait(offers, return_when=asyncio.FIRST_EXCEPTION)
    assert [type(task.exception()) for task in done if task.exception()] == [TooManyOffers]
    for task in rest:
        task.cancel()
    await asyncio.wait(rest)
    assert (await intake.take([RUN], worker.holder())).num_known >= 0, "a turn is lost"
    await fetcher.close()
    intake.close()


async def test_a_full_store_forgets_the_old_for_the_new(worker: Peer) -> None:
    async with running_peer(takes_offers=True, num_slots=24) as store, offering(worker, [store]) as offers:
        other = chain(24, first_token=5000)
        fill(store.store, other)
        offers.offer(RUN.part(0, 16))
        await wait_until(lambda: offers.num_taken == 16)
        assert num_held(store, RUN.part(0, 16)) == 16
        assert store.store.describe().tiers[Tier.MEMORY].num_blocks == 24


async def test_a_store_cancelled_within_a_take_leaves_nothing(worker: Peer) -> None:
    async with running_peer(takes_offers=True) as store:
        assert store.intake is not None
        for num_turns in range(0, 60, 3):
            taking = asyncio.create_task(store.intake.take([RUN], worker.holder()))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            taking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await taking
            await store.store.drop(None)
        await wait_until(lambda: worker.listener.num_connections == 0)


# What a store refuses.


def _put(**fields: object) -> kv_pb2.PutRequest:
    facts: dict[str, object] = {
        "store_epoch": EPOCH, "model_fingerprint": FINGERPRINT, "layout": layout_to_wire(LAYOUT),
        "block_format": FORMAT_VERSION, "runs": runs_to_wire([RUN]),
        "holder": holder_to_wire(KvHolder(worker_id="w", epoch=1, control_address="a:1", num_blocks=0)),
    }  # fmt: skip
    return kv_pb2.PutRequest(**(facts | fields))  # type: ignore[arg-type]


def _run(**fields: object) -> kv_pb2.OfferedRun:
    facts: dict[str, object] = {
        "root": RUN.root, "parent": RUN.parent, "first_position": 0, "block_keys": RUN.keys[0]
    }  # fmt: skip
    return kv_pb2.OfferedRun(**(facts | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (_put(store_epoch=1), grpc.StatusCode.FAILED_PRECONDITION),
        (_put(model_fingerprint=b"x"), grpc.StatusCode.FAILED_PRECONDITION),
        (_put(block_format=b"x"), grpc.StatusCode.FAILED_PRECONDITION),
        (_put(runs=[_run(block_keys=b"")]), grpc.StatusCode.INVALID_ARGUMENT),
        (_put(runs=[_run(root=b"short")]), grpc.StatusCode.INVALID_ARGUMENT),
        (_put(runs=[_run(first_position=3)]), grpc.StatusCode.INVALID_ARGUMENT),
        (_put(runs=[_run(parent=bytes(16))]), grpc.StatusCode.INVALID_ARGUMENT),
        (_put(runs=[_run()] * 257), grpc.StatusCode.INVALID_ARGUMENT),
        (_put(runs=[_run(block_keys=RUN.keys[0] * 2)]), grpc.StatusCode.INVALID_ARGUMENT),
        (_put(runs=[_run(parent=RUN.keys[0], first_position=1)]), grpc.StatusCode.INVALID_ARGUMENT),
        (_put(runs=[_run(parent=bytes(16), first_position=2**32 - 1)]), grpc.StatusCode.INVALID_ARGUMENT),
        (_put(runs=[_run(block_keys=bytes(16 * 40_000))] * 2), grpc.StatusCode.INVALID_ARGUMENT),
        (_put(holder=None), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_offers_that_cannot_be_are_refused(request_: kv_pb2.PutRequest, code: grpc.StatusCode) -> None:
    async with (
        running_peer(takes_offers=True) as store,
        grpc.aio.insecure_channel(store.control_address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await kv_pb2_grpc.KvTransferStub(channel).Put(request_, timeout=5.0)
        assert error.value.code() is code


async def test_a_worker_takes_no_offers_but_tells_and_forgets_what_it_holds(worker: Peer) -> None:
    async with grpc.aio.insecure_channel(worker.control_address) as channel:
        stub = kv_pb2_grpc.KvTransferStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Put(_put(), timeout=5.0)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED

        lookup = kv_pb2.LookupRequest(
            source_epoch=EPOCH, block_format=FORMAT_VERSION, block_keys=b"".join(chain(50).keys)
        )
        found = await stub.Lookup(lookup, timeout=5.0)
        assert (found.num_blocks, found.tiers) == (40, bytes([Tier.MEMORY]) * 40)

        described = await stub.DescribeTiers(kv_pb2.DescribeTiersRequest(num_prefixes=5), timeout=5.0)
        assert [(tier.name, tier.num_blocks) for tier in described.tiers] == [("memory", 40)]
        assert [(prefix.root, prefix.num_blocks) for prefix in described.prefixes] == [(RUN.root, 40)]

        other = kv_pb2.DropRequest(source_epoch=EPOCH, root=chain(1, cache_salt="other").root)
        assert (await stub.Drop(other, timeout=5.0)).num_blocks == 0
        ours = kv_pb2.DropRequest(source_epoch=EPOCH, root=RUN.root)
        assert (await stub.Drop(ours, timeout=5.0)).num_blocks == 40
        assert (await stub.Lookup(lookup, timeout=5.0)).num_blocks == 0
