"""A worker of the role store: memory and disk for the KV of others, and no engine.

Computing workers offer it what they computed (`Put`); it pulls what it does not hold, and others pull from it. It has
the model's config and weights only to know which model's KV it holds: it never loads them.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from typing import Any

import grpc
from prometheus_client import CollectorRegistry

from kvstore.holdings import Holdings
from kvstore.tiers.tier import Tier
from protos import worker_pb2, worker_pb2_grpc
from protos.kv_pb2_grpc import add_KvTransferServicer_to_server
from workers.block_server import BlockService
from workers.config import WorkerConfig
from workers.drain import Drain, Left
from workers.drain_service import DrainService
from workers.handoff_server import KvTransferService
from workers.identity import Identity
from workers.membership import BlockReport, Membership
from workers.metrics import serve_metrics
from workers.model.info import ModelInfo, load_model_info
from workers.model.quantized_checkpoint import open_checkpoint
from workers.offer_intake import OfferIntake
from workers.planes import listening, make_identity, running, source_identity
from workers.reports import Load
from workers.server import LAST_WORDS_S, make_server
from workers.tiers import open_tiers
from workers.wire import description_to_wire

MAX_CONNECTIONS = 128
MAX_OFFERS = 4


class StoreWorker:
    """`serve` is its life. Must be built inside a running event loop. Raises TierUnusable."""

    def __init__(self, config: WorkerConfig, model: ModelInfo) -> None:
        self.registry = CollectorRegistry()
        self._config = config
        self._model = model
        self._epoch = secrets.randbits(63)
        self._holdings = Holdings()
        self._tiers = open_tiers(config, model, holdings=self._holdings, registry=self.registry)

    async def serve(self, *, stop: asyncio.Event, drain: Drain, on_ready: Callable[[Identity], None]) -> None:
        """Serves until it is drained or `stop` is set, and leaves nothing behind.

        Raises CannotListen before it is ready.
        """
        config, tiers = self._config, self._tiers
        async with contextlib.AsyncExitStack() as stack:  # ends in the reverse order
            stack.push_async_callback(tiers.close)
            intake = OfferIntake(tiers.store, fetcher=tiers.fetcher, max_offers=MAX_OFFERS)
            stack.callback(intake.close)
            data_address = await stack.enter_async_context(
                listening(config, [tiers.exports], max_connections=MAX_CONNECTIONS)
            )
            if config.metrics_port is not None:
                stack.enter_context(serve_metrics(self.registry, config.metrics_port))

            def describe() -> worker_pb2.WorkerDescription:
                return description_to_wire(identity, self._load(), is_draining=drain.is_draining)

            def left() -> Left:
                return Left(num_blocks=intake.num_unsettled_blocks)

            service = StoreService(describe, draining=DrainService(drain, left=left))
            server, control_address = make_server(config.control_address, service=service)
            identity = make_identity(
                config,
                self._model,
                epoch=self._epoch,
                control_address=control_address,
                data_address=data_address,
            )
            blocks = BlockService(tiers.store, exports=tiers.exports, metrics=tiers.metrics, intake=intake)
            add_KvTransferServicer_to_server(
                KvTransferService(identity=source_identity(identity), blocks=blocks), server
            )
            await server.start()
            stack.push_async_callback(server.stop, LAST_WORDS_S)
            tasks = {await stack.enter_async_context(running(work)) for work in (stop.wait(), tiers.tell())}
            membership = self._membership(describe)
            if config.directories:
                tasks.add(await stack.enter_async_context(running(membership.run())))
            tasks.add(await stack.enter_async_context(running(_drained(drain, membership, intake))))
            on_ready(identity)
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            drain.stopped(left())

    def _membership(self, describe: Callable[[], worker_pb2.WorkerDescription]) -> Membership:
        return Membership(
            self._config.directories,
            describe=describe,
            blocks=BlockReport(self._holdings, take_device_events=None),
            on_stores=lambda stores: None,
        )

    def _load(self) -> Load:
        memory = self._tiers.store.describe().tiers[Tier.MEMORY]
        return Load(
            num_running=0,
            num_waiting=0,
            num_pages=memory.capacity_blocks,
            num_free_pages=memory.capacity_blocks - memory.num_blocks,
            num_waiting_tokens=0,
            num_leases=0,
            num_demanded_pages=0,
        )


async def _drained(drain: Drain, membership: Membership, intake: OfferIntake) -> None:
    """Returns when a drain has been begun and what was offered before has been taken, or its time is over."""
    await drain.begun()
    await drain.finish(_settled(membership, intake))


async def _settled(membership: Membership, intake: OfferIntake) -> None:
    await membership.announce()  # so that workers offer it nothing more
    await intake.settled()


class StoreService(worker_pb2_grpc.WorkerServicer):
    """Says what this is, and that it computes nothing."""

    def __init__(
        self, describe: Callable[[], worker_pb2.WorkerDescription], *, draining: DrainService
    ) -> None:
        self._describe = describe
        self._draining = draining

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: Any
    ) -> worker_pb2.WorkerDescription:
        return self._describe()

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainReply:
        return await self._draining.drain(request, context)

    async def Session(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        await context.abort(
            grpc.StatusCode.UNIMPLEMENTED,
            f"{self._describe().worker_id} is a store: it keeps KV and computes nothing",
        )


def load_store_model(config: WorkerConfig) -> ModelInfo:
    """Which model's KV this store keeps. Raises CheckpointError, ValueError."""
    return load_model_info(
        config.model_path,
        open_checkpoint(config.model_path),
        dtype=config.dtype,
        quantize=config.quantize,
        kv_dtype=config.kv_dtype,
        max_model_len=config.max_model_len,
    )
