"""The gRPC server of a worker: sessions with gateways, `Describe`, the KV transfer service and health.

One handler per session owns two tasks: one reads what the gateway asks, one writes what the outbox holds. Whatever ends
the session, its requests are aborted before the gateway hears of it.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from kvstore.listener import is_answered
from protos import worker_pb2, worker_pb2_grpc
from workers.drain_service import DrainService
from workers.errors import CannotListen, WorkerError
from workers.grpc_options import SERVER_OPTIONS
from workers.logs import log_event
from workers.loop import RequestLoop
from workers.outbox import MAX_UNREAD_STEPS, Outbox
from workers.request import RequestId, SessionId
from workers.wire import request_from_wire

HELLO_TIMEOUT_S = 5.0
# How long a gateway may take to read the last words of sessions that end with the worker.
LAST_WORDS_S = 1.0

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_logger = logging.getLogger(__name__)


class _EndSession(Exception):
    """The session is to end with this status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """`describe` gives the present description; its epoch and fingerprint are what sessions must agree with."""

    def __init__(
        self,
        loop: RequestLoop,
        *,
        describe: Callable[[], worker_pb2.WorkerDescription],
        draining: DrainService,
        now_s: Callable[[], float],
    ) -> None:
        self._loop = loop
        self._describe = describe
        self._draining = draining
        self._outboxes: set[Outbox] = set()
        self._now_s = now_s

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: Any
    ) -> worker_pb2.WorkerDescription:
        return self._describe()

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainReply:
        return await self._draining.drain(request, context)

    def end_sessions(self) -> None:
        """Once all that is to be said has been written. Requests that still run are aborted with their sessions."""
        for outbox in self._outboxes:
            outbox.close()

    async def Session(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        try:
            gateway_id = await self._greet(context)
            await self._serve(context, gateway_id)
        except _EndSession as end:
            log_event(
                _logger, "session_refused", level=logging.WARNING, status=end.code.name, detail=end.message
            )
            await context.abort(end.code, end.message)

    async def _greet(self, context: Any) -> str:
        """Hello and welcome; the gateway's id."""
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                message = await context.read()
        except TimeoutError:
            raise _EndSession(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"no hello within {HELLO_TIMEOUT_S:g} s"
            ) from None
        if message is _EOF or message.WhichOneof("message") != "hello":
            raise _EndSession(
                grpc.StatusCode.INVALID_ARGUMENT, "the first message of a session must be hello"
            )
        hello, worker = message.hello, self._describe()
        if hello.worker_epoch != worker.epoch:
            raise _EndSession(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"hello means epoch {hello.worker_epoch} of {worker.worker_id}, this is epoch {worker.epoch}",
            )
        if hello.model_fingerprint != worker.model.fingerprint:
            raise _EndSession(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"hello means model fingerprint {hello.model_fingerprint.hex()},"
                f" this worker serves {worker.model.fingerprint.hex()}",
            )
        await context.write(worker_pb2.SessionEvent(welcome=worker_pb2.Welcome(worker=worker)))
        return str(hello.gateway_id)

    async def _serve(self, context: Any, gateway_id: str) -> None:
        outbox = Outbox()
        self._outboxes.add(outbox)
        session_id = self._loop.open_session(outbox)
        log_event(_logger, "session_opened", session=session_id, gateway=gateway_id)
        tasks = (
            asyncio.create_task(self._read(context, session_id, outbox)),
            asyncio.create_task(_write(context, outbox)),
            asyncio.create_task(_until_overflow(outbox)),
        )
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._outboxes.discard(outbox)
            self._loop.close_session(session_id)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            log_event(_logger, "session_closed", session=session_id, gateway=gateway_id)
        for task in done:
            task.result()

    async def _read(self, context: Any, session_id: SessionId, outbox: Outbox) -> None:
        """Until the gateway has closed its side."""
        while (message := await context.read()) is not _EOF:
            match message.WhichOneof("message"):
                case "submit":
                    self._submit(message.submit, session_id, outbox)
                case "abort":
                    self._loop.abort(session_id, RequestId(message.abort.request_id))
                case other:
                    raise _EndSession(
                        grpc.StatusCode.INVALID_ARGUMENT, f"a session takes submit and abort, got {other}"
                    )

    def _submit(self, submit: worker_pb2.Submit, session_id: SessionId, outbox: Outbox) -> None:
        try:
            self._loop.submit(request_from_wire(submit, session_id=session_id, now_s=self._now_s()))
        except WorkerError as error:
            outbox.put_refusal(submit.request_id, error)


async def _write(context: Any, outbox: Outbox) -> None:
    while (event := await outbox.get()) is not None:
        await context.write(event)


async def _until_overflow(outbox: Outbox) -> None:
    await outbox.overflowed.wait()
    raise _EndSession(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"the gateway is {MAX_UNREAD_STEPS} steps behind; it must read faster",
    )


def make_server(address: str, *, service: worker_pb2_grpc.WorkerServicer) -> tuple[grpc.aio.Server, str]:
    """A server, not yet started, and the address it is bound to, with the port the system chose.

    Further services may be added before the start. Raises CannotListen.
    """
    path = address.removeprefix("unix:")
    if path != address and is_answered(path):
        # gRPC would take the path over and leave the other worker listening on nothing.
        raise CannotListen(f"cannot listen on {address}: another process does")
    server = grpc.aio.server(options=SERVER_OPTIONS)
    worker_pb2_grpc.add_WorkerServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)  # type: ignore[attr-defined]
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise CannotListen(f"cannot listen on {address}: {error}") from error
    if path != address:
        return server, address
    return server, f"{address.rpartition(':')[0]}:{port}"
