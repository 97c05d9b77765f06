"""One worker that computes, wired by hand: loop, engine, hand-over, tiers, server and membership."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace

import grpc

from kvstore.addresses import Address
from kvstore.block_stream import chunk_blocks
from kvstore.blocks import BlockKey
from kvstore.holdings import Holdings
from kvstore.tiers.tier import Tier, TierStats
from protos import worker_pb2
from protos.kv_pb2_grpc import add_KvTransferServicer_to_server
from workers.block_server import BlockService, DevicePages
from workers.config import WorkerConfig
from workers.cost_model import CostModel
from workers.drain import MAX_NAMED_REQUESTS, Drain, Left
from workers.drain_service import DrainService
from workers.engine.engine import Engine
from workers.exports import ExportLimits, Exports
from workers.handoff import Puller, PullTimeouts
from workers.handoff_server import ComputingSource, KvTransferService
from workers.identity import Identity
from workers.load_parts import LoadLimits, LoadParts
from workers.loading import Loader
from workers.logs import log_event
from workers.loop import LoopLimits, LoopParts, RequestLoop
from workers.membership import BlockReport, Membership
from workers.messages import Message
from workers.metrics import WorkerMetrics, serve_metrics
from workers.offer_intake import OfferIntake
from workers.offers import OfferLimits, Offers
from workers.planes import listening, make_identity, running, source_identity
from workers.policies import POLICIES
from workers.request import KvHolder
from workers.scheduler import SchedulerLimits
from workers.server import LAST_WORDS_S, WorkerService, make_server
from workers.state import EngineState, StateLimits
from workers.swap import Swap
from workers.tickets import TicketIssuer
from workers.tier_traffic import TierTraffic
from workers.tiers import Tiers, open_tiers
from workers.wire import description_to_wire
from workers.write_behind import WriteBehind, WriteParts

# How long the requests of a worker that stops may take to end; they are aborted, so one step is enough.
SETTLE_TIMEOUT_S = 1.0
# When a worker drains; half of what may wait to be offered, so that what is computed meanwhile pushes none out.
MAX_HANDED_ON_BLOCKS = OfferLimits().max_waiting_blocks // 2
# And so much of its memory tier: who takes it has no more memory, as a rule, and blocks of its own to lose.
HANDED_ON_SHARE = 4
# Offers of workers that drain, taken at a time: their blocks travel beside what is computed here.
MAX_OFFERS = 1
# Pulls of blocks by key, beside the hand-overs of all requests that run.
MAX_BLOCK_PULLS = 64

_logger = logging.getLogger(__name__)


class Worker:
    """Built once the engine is loaded; `serve` is its life. Must be built inside a running event loop.

    Raises `TierUnusable`.
    """

    def __init__(self, config: WorkerConfig, engine: Engine) -> None:
        model, memory = engine.model, engine.kv_pool
        self._config = config
        self._engine = engine
        self._epoch = secrets.randbits(63)
        self._holdings = Holdings()
        self.state = EngineState(
            StateLimits(
                num_pages=memory.num_pages,
                max_model_len=model.max_model_len,
                vocab_size=model.vocab_size,
                eos_token_ids=model.eos_token_ids,
                model_fingerprint=model.fingerprint,
                max_num_waiting=config.max_num_waiting,
            ),
            policy=POLICIES[config.scheduling_policy],
        )
        self.metrics = WorkerMetrics(
            model_name=config.model_name,
            num_pages=memory.num_pages,
            block_size_tokens=model.layout.block_size_tokens,
        )
        self.exports = Exports(
            memory,
            limits=ExportLimits(lease_s=config.lease_s),
            on_released=lambda request_id: self.loop.lease_ended(request_id, released=True),
            on_expired=lambda request_id: self.loop.lease_ended(request_id, released=False),
            on_caught_up=lambda request_id: self.loop.caught_up(request_id),
        )
        self.puller = Puller(
            memory,
            model_fingerprint=model.fingerprint,
            timeouts=PullTimeouts(total_s=config.pull_timeout_s),
            max_concurrent_pulls=config.max_num_pulls,
        )
        self.tiers: Tiers | None = None
        if config.memory_tier_bytes:
            self.tiers = open_tiers(config, model, holdings=self._holdings, registry=self.metrics.registry)
        self.offers = Offers(
            model_fingerprint=model.fingerprint, layout=model.layout, tell=self._tell_offered
        )
        if not config.directories:
            self.offers.set_stores(())  # nobody else will say so
        self._tier_traffic = None if self.tiers is None else self._traffic(self.tiers)
        self.loop = RequestLoop(
            LoopParts(
                state=self.state,
                engine=engine,
                exports=self.exports,
                puller=self.puller,
                metrics=self.metrics,
                tiers=self._tier_traffic,
            ),
            limits=LoopLimits(
                step=SchedulerLimits(
                    max_num_batched_tokens=config.max_num_batched_tokens,
                    max_num_seqs=config.max_num_seqs,
                    max_num_pulls=config.max_num_pulls,
                ),
                max_num_submitted=config.max_num_waiting,
                max_num_moves=config.max_num_moves,
            ),
        )

    async def serve(self, *, stop: asyncio.Event, drain: Drain, on_ready: Callable[[Identity], None]) -> None:
        """Serves until it is drained or `stop` is set, then aborts what is there and leaves nothing behind.

        Raises `CannotListen` before it is ready, `EngineFailed` if the engine fails step after step.
        """
        config = self._config
        async with contextlib.AsyncExitStack() as stack:  # ends in the reverse order
            issuers: list[TicketIssuer] = [self.exports]
            intake: OfferIntake | None = None
            if self.tiers is not None:
                stack.push_async_callback(self.tiers.close)
                issuers.append(self.tiers.exports)
                intake = OfferIntake(self.tiers.store, fetcher=self.tiers.fetcher, max_offers=MAX_OFFERS)
                stack.callback(intake.close)
            data_address = await stack.enter_async_context(
                listening(config, issuers, max_connections=config.max_num_seqs + MAX_BLOCK_PULLS)
            )
            stack.push_async_callback(self.puller.close)

            def describe() -> worker_pb2.WorkerDescription:
                return description_to_wire(identity, self.state.load(), is_draining=drain.is_draining)

            draining = DrainService(drain, left=self._left)
            service = WorkerService(self.loop, describe=describe, draining=draining, now_s=time.time)
            if config.metrics_port is not None:
                stack.enter_context(serve_metrics(self.metrics.registry, config.metrics_port))
            server, control_address = make_server(config.control_address, service=service)
            identity = self._identity(control_address, data_address)
            add_KvTransferServicer_to_server(self._transfers(identity, intake), server)
            loop_task = await stack.enter_async_context(running(self.loop.run()))
            await server.start()
            stack.push_async_callback(self._end_all, server, service, loop_task)
            tasks = {loop_task, await stack.enter_async_context(running(stop.wait()))}
            if self.tiers is not None:
                for work in (self.offers.run(_holder(identity)), self.tiers.tell()):
                    tasks.add(await stack.enter_async_context(running(work)))
            membership = self._membership(describe)
            if config.directories:
                tasks.add(await stack.enter_async_context(running(membership.run())))
            tasks.add(await stack.enter_async_context(running(self._drained(drain, membership))))
            on_ready(identity)
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            drain.stopped(self._left())

    async def _drained(self, drain: Drain, membership: Membership) -> None:
        """Returns when a drain has been begun and all is done, or its time is over."""
        await drain.begun()
        self.loop.stop_admitting()
        left = self._left()
        log_event(_logger, "draining", num_requests=left.num_requests, num_leases=left.num_leases)
        await drain.finish(self._settled(membership))

    def _offer_most_valuable(self) -> None:
        """What would be lost with this worker. Who has it already answers so without a copy.

        The most valuable last, so that it is what its taker used last. To find it among 100,000 blocks holds the event
        loop for 14 ms (Xeon), once.
        """
        if self.tiers is not None and self.offers.num_stores:
            num_slots = self.tiers.store.describe().tiers[Tier.MEMORY].capacity_blocks
            max_blocks = min(MAX_HANDED_ON_BLOCKS, max(1, num_slots // HANDED_ON_SHARE))
            for run in reversed(self.tiers.store.most_valuable(max_blocks=max_blocks)):
                self.offers.offer(run, is_extra=True)

    async def _settled(self, membership: Membership) -> None:
        # Even by an idle worker: a gateway that has heard of it sends nothing that would find nobody here.
        await membership.announce()
        self._offer_most_valuable()
        await self.loop.settled()
        await self.offers.settled()

    def _left(self) -> Left:
        load = self.state.load()
        return Left(
            num_requests=len(self.loop.request_ids) - load.num_leases,
            num_leases=load.num_leases,
            num_pages=load.num_pages - load.num_free_pages,
            num_blocks=self.offers.num_unsettled_blocks
            + (0 if self._tier_traffic is None else self._tier_traffic.num_writing_blocks),
            num_extra_blocks=self.offers.num_unsettled_extra_blocks,
            request_ids=self.loop.request_ids[:MAX_NAMED_REQUESTS],
        )

    async def _end_all(
        self, server: grpc.aio.Server, service: WorkerService, loop_task: asyncio.Task[None]
    ) -> None:
        """Closes all sessions, which aborts their requests, and waits until the loop has seen it."""
        service.end_sessions()
        await server.stop(LAST_WORDS_S)
        self.exports.close_all()
        settled = asyncio.create_task(self.loop.settled())
        await asyncio.wait(
            {settled, loop_task}, timeout=SETTLE_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        settled.cancel()

    def _traffic(self, tiers: Tiers) -> TierTraffic:
        config, kv_pool = self._config, self._engine.kv_pool
        costs = CostModel(tokens_per_step=config.max_num_batched_tokens)

        def post(message: Message) -> None:
            self.loop.post(message)

        loader = Loader(
            LoadParts(
                state=self.state,
                kv_pool=kv_pool,
                store=tiers.store,
                fetcher=tiers.fetcher,
                codec=tiers.codec,
                costs=costs,
                metrics=tiers.metrics,
                limits=LoadLimits(
                    max_level=config.max_level,
                    chunk_blocks=chunk_blocks(block_bytes=kv_pool.layout.block_bytes),
                    ttft_objective_s=config.ttft_objective_s,
                    timeout_s=config.pull_timeout_s,
                ),
                post=post,
            )
        )
        write_behind = WriteBehind(
            WriteParts(
                state=self.state,
                kv_pool=kv_pool,
                store=tiers.store,
                metrics=tiers.metrics,
                offer=self.offers.offer,
                post=post,
            )
        )
        swap = Swap(self.state, loader, write_behind, costs=costs)
        return TierTraffic(loader, write_behind, swap=swap, costs=costs)

    def _tell_offered(self, num_blocks: int, outcome: str) -> None:
        if self.tiers is not None:
            self.tiers.metrics.write_behind(num_blocks, outcome)

    def _transfers(self, identity: Identity, intake: OfferIntake | None) -> KvTransferService:
        blocks = None
        if self.tiers is not None:
            blocks = BlockService(
                self.tiers.store,
                exports=self.tiers.exports,
                metrics=self.tiers.metrics,
                device=DevicePages(stats=self._device_stats, drop=self._drop_pages),
                intake=intake,
            )
        computing = ComputingSource(
            exports=self.exports,
            open_move=lambda request_id, num_pages: self.loop.open_move(request_id, num_pages=num_pages),
        )
        return KvTransferService(identity=source_identity(identity), computing=computing, blocks=blocks)

    def _membership(self, describe: Callable[[], worker_pb2.WorkerDescription]) -> Membership:
        return Membership(
            self._config.directories,
            describe=describe,
            blocks=BlockReport(self._holdings, take_device_events=self.state.take_block_events),
            on_stores=self.offers.set_stores,
        )

    async def _drop_pages(self, root: BlockKey | None) -> int:
        if self._tier_traffic is not None:
            await self._tier_traffic.drop(root)
        return self.state.drop(root)

    def _device_stats(self) -> TierStats:
        num_pages, block_bytes = self._engine.kv_pool.num_pages, self._engine.model.layout.block_bytes
        num_cached = self.state.num_cached_pages
        return TierStats(
            num_blocks=num_cached,
            capacity_blocks=num_pages,
            used_bytes=num_cached * block_bytes,
            capacity_bytes=num_pages * block_bytes,
            num_hit_blocks=0,
            num_stored_blocks=0,
            num_evicted_blocks=0,
            num_errors=0,
        )

    def _identity(self, control_address: str, data_address: Address) -> Identity:
        identity = make_identity(
            self._config,
            replace(self._engine.model, max_model_len=self.state.max_request_tokens),
            epoch=self._epoch,
            control_address=control_address,
            data_address=data_address,
        )
        return replace(identity, max_num_seqs=self._config.max_num_seqs)


def _holder(identity: Identity) -> KvHolder:
    """As a store finds this worker."""
    return KvHolder(
        worker_id=identity.worker_id,
        epoch=identity.epoch,
        control_address=identity.control_address,
        num_blocks=0,
    )
