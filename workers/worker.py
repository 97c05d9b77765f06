"""One worker, wired by hand: the loop, the engine, the hand-over, the server and the membership."""

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc

from kvstore.addresses import Address, TcpAddress, parse_address
from kvstore.listener import Listener
from protos import worker_pb2
from protos.kv_pb2_grpc import add_KvTransferServicer_to_server
from workers.agreement import SourceIdentity
from workers.config import WorkerConfig
from workers.engine.engine import Engine
from workers.errors import CannotListen
from workers.exports import ExportLimits, Exports
from workers.handoff import Puller, PullTimeouts
from workers.handoff_server import KvTransferService
from workers.identity import Identity
from workers.loop import RequestLoop
from workers.membership import BlockReport, Membership
from workers.metrics import WorkerMetrics
from workers.scheduler import SchedulerLimits
from workers.server import WorkerService, make_server
from workers.state import EngineState, StateLimits
from workers.tickets import TicketDesk
from workers.wire import description_to_wire

# How long the requests of a worker that stops may take to end; they are aborted, so one step is enough.
SETTLE_TIMEOUT_S = 1.0
DATA_IDLE_TIMEOUT_S = 5.0


class Worker:
    """Built once the engine is loaded; `serve` is its life. Must be built inside a running event loop."""

    def __init__(self, config: WorkerConfig, engine: Engine) -> None:
        model, memory = engine.model, engine.kv_pool
        self._config = config
        self._engine = engine
        self._epoch = secrets.randbits(63)
        self.state = EngineState(
            StateLimits(
                num_pages=memory.num_pages,
                max_model_len=model.max_model_len,
                vocab_size=model.vocab_size,
                eos_token_ids=model.eos_token_ids,
                model_fingerprint=model.fingerprint,
                max_num_waiting=config.max_num_waiting,
            )
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
        )
        self.puller = Puller(
            memory,
            model_fingerprint=model.fingerprint,
            timeouts=PullTimeouts(total_s=config.pull_timeout_s),
            max_concurrent_pulls=config.max_num_pulls,
        )
        self.loop = RequestLoop(
            state=self.state,
            engine=engine,
            limits=SchedulerLimits(
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_num_seqs=config.max_num_seqs,
                max_num_pulls=config.max_num_pulls,
            ),
            exports=self.exports,
            puller=self.puller,
            metrics=self.metrics,
            max_num_submitted=config.max_num_waiting,
        )

    async def serve(self, *, stop: asyncio.Event, on_ready: Callable[[Identity], None]) -> None:
        """Serves until `stop` is set, then aborts what is there and leaves nothing behind.

        Raises `CannotListen` before it is ready, `EngineFailed` if the engine fails step after step.
        """
        async with contextlib.AsyncExitStack() as stack:  # ends in the reverse order
            listener = Listener(
                TicketDesk([self.exports]).serve,
                max_connections=self._config.max_num_seqs,
                idle_timeout_s=DATA_IDLE_TIMEOUT_S,
            )
            await _listen(listener, self._config.data_address)
            stack.push_async_callback(listener.close)
            stack.push_async_callback(self.puller.close)
            service = WorkerService(self.loop, describe=lambda: self._describe(identity), now_s=time.time)
            if self._config.metrics_port is not None:
                self.metrics.serve(self._config.metrics_port)
            server, control_address = make_server(self._config.control_address, service=service)
            identity = self._identity(control_address, listener.address)
            add_KvTransferServicer_to_server(
                KvTransferService(identity=_source_identity(identity), exports=self.exports), server
            )
            loop_task = await stack.enter_async_context(_running(self.loop.run()))
            await server.start()
            stack.push_async_callback(self._end_all, server, loop_task)
            tasks = {loop_task, await stack.enter_async_context(_running(stop.wait()))}
            if self._config.directory:
                tasks.add(await stack.enter_async_context(_running(self._membership(identity).run())))
            on_ready(identity)
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    async def _end_all(self, server: grpc.aio.Server, loop_task: asyncio.Task[None]) -> None:
        """Closes all sessions, which aborts their requests, and waits until the loop has seen it."""
        await server.stop(None)
        self.exports.close_all()
        settled = asyncio.create_task(self.loop.settled())
        await asyncio.wait(
            {settled, loop_task}, timeout=SETTLE_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        settled.cancel()

    def _membership(self, identity: Identity) -> Membership:
        return Membership(
            self._config.directory,
            describe=lambda: self._describe(identity),
            blocks=BlockReport(self.state),
        )

    def _describe(self, identity: Identity) -> worker_pb2.WorkerDescription:
        return description_to_wire(identity, self.state.load())

    def _identity(self, control_address: str, data_address: Address) -> Identity:
        config, model = self._config, self._engine.model
        if config.advertise_host:
            if not control_address.startswith("unix:"):
                control_address = f"{config.advertise_host}:{control_address.rpartition(':')[2]}"
            if isinstance(data_address, TcpAddress):
                data_address = TcpAddress(host=config.advertise_host, port=data_address.port)
        return Identity(
            worker_id=config.worker_id,
            epoch=self._epoch,
            role=config.role,
            pid=os.getpid(),
            control_address=control_address,
            data_address=str(data_address),
            model_name=config.model_name,
            fingerprint=model.fingerprint,
            max_model_len=self.state.max_request_tokens,
            vocab_size=model.vocab_size,
            layout=model.layout,
        )


async def _listen(listener: Listener, address: str) -> None:
    try:
        await listener.start(parse_address(address))
    except OSError as error:
        raise CannotListen(f"cannot listen on {address}: {error}") from error


def _source_identity(identity: Identity) -> SourceIdentity:
    return SourceIdentity(
        epoch=identity.epoch,
        model_fingerprint=identity.fingerprint,
        layout=identity.layout,
        data_address=identity.data_address,
    )


@contextlib.asynccontextmanager
async def _running(work: Coroutine[Any, Any, Any]) -> AsyncIterator[asyncio.Task[Any]]:
    """A task that is cancelled, and awaited, at the end. What it raises is for who looks at it while it is there."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})
