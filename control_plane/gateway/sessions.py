"""One gRPC session per worker: opened when the worker joins the directory, closed when it leaves. Stores have none.

A session carries all requests of this gateway on that worker. What the worker says about a request goes to
the sink it was submitted with, without a task or a queue in between. A session that breaks tells all its
sinks at once and is opened again for as long as the worker is in the directory.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from control_plane.directory.member import Incarnation, Member, Role, WorkerId
from control_plane.directory.memory import Change, ChangeKind
from control_plane.gateway import wire
from control_plane.gateway.absences import Absences
from control_plane.gateway.logs import log_event
from control_plane.gateway.wire import WorkerOutput
from control_plane.routing.view import WorkerView
from protos import worker_pb2, worker_pb2_grpc

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 1.0

# A worker that is frozen or cut off leaves the directory within its ttl, which closes the session as well. The
# pings are for what the directory cannot see: a worker whose heartbeats arrive over a path that ours does not take,
# or, while Redis is away, at another gateway.
CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),  # by default a minute, whatever the keepalive timeout says
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A new incarnation at an old address must not inherit the back-off of the connection to the dead one.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
)

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SessionLost:
    """The last word of a session to its sinks: nothing more comes, and the worker has aborted the request.

    `is_orderly`: the worker had said that it would stop.
    """

    reason: str
    is_orderly: bool = False


Sink = Callable[[WorkerOutput | SessionLost], None]


class SessionClosed(Exception):
    """Nothing can be sent to this worker now."""


class _Broken(Exception):
    """The session cannot go on; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionSettings:
    """`max_queued_messages`: of one session, before it counts as stuck and is broken off."""

    gateway_id: str
    hello_timeout_s: float = 2.0
    max_queued_messages: int = 16384


class WorkerSession:
    """Used from one event loop. `submit`, `abort` and `close` never wait.

    `on_change` is called when the session becomes ready and when it is lost, and before that `on_lost` if it was.
    """

    def __init__(
        self,
        member: Member,
        *,
        settings: SessionSettings,
        on_change: Callable[[], None],
        on_lost: Callable[[Member], None],
    ) -> None:
        self.member = member
        self.is_ready = False
        self._settings = settings
        self._on_change = on_change
        self._on_lost = on_lost
        self._sinks: dict[str, Sink] = {}
        self._outbox: asyncio.Queue[worker_pb2.SessionRequest] = asyncio.Queue(settings.max_queued_messages)
        self._connection: asyncio.Task[None] | None = None
        self._num_unreported_tokens = 0
        self._num_unreported_pages = 0
        self._last_pick = 0
        self.task = asyncio.create_task(self._run(), name=f"session with {member.incarnation}")

    @property
    def num_requests(self) -> int:
        return len(self._sinks)

    def view(self) -> WorkerView:
        return WorkerView(
            incarnation=self.member.incarnation,
            role=self.member.role,
            model_fingerprint=self.member.model.fingerprint,
            load=self.member.load,
            is_healthy=self.is_ready,
            is_draining=self.member.is_draining,
            num_assigned=len(self._sinks),
            num_unreported_tokens=self._num_unreported_tokens,
            num_unreported_pages=self._num_unreported_pages,
            max_num_seqs=self.member.max_num_seqs,
            last_pick=self._last_pick,
        )

    def update(self, member: Member) -> None:
        """What was sent before this report is taken to be in it."""
        self.member = member
        self._num_unreported_tokens = 0
        self._num_unreported_pages = 0

    def note_pick(self, number: int, *, num_tokens: int, num_pages: int) -> None:
        """Counts what was just sent against this worker until its next report."""
        self._last_pick = number
        self._num_unreported_tokens += num_tokens
        self._num_unreported_pages += num_pages

    def note_move(self, *, num_pages: int) -> None:
        """As `note_pick`, for a request that moves here: the next new one need not go elsewhere for that."""
        self._num_unreported_pages += num_pages

    def submit(self, message: worker_pb2.SessionRequest, *, sink: Sink) -> None:
        """Raises SessionClosed, and then the sink hears nothing."""
        request_id = message.submit.request_id
        assert request_id not in self._sinks, f"{request_id} was submitted twice"
        if not self.is_ready or not self._send(message):
            raise SessionClosed(f"no session with {self.member.incarnation}")
        self._sinks[request_id] = sink

    def abort(self, request_id: str) -> None:
        """The sink hears nothing more. Does nothing where the worker has finished the request already."""
        if self._sinks.pop(request_id, None) is not None and self.is_ready:
            self._send(wire.write_abort(request_id))

    def close(self, reason: str) -> None:
        """Tells all sinks now; `task` ends soon after."""
        self._fail_all(reason)
        self.task.cancel()

    def _send(self, message: worker_pb2.SessionRequest) -> bool:
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            # An abort must not get lost, and the end of the session aborts everything.
            self._fail_all("the worker takes no messages")
            if self._connection is not None:
                self._connection.cancel()
            return False
        return True

    def _fail_all(self, reason: str) -> None:
        if self.is_ready:
            self._on_lost(self.member)
        self.is_ready = False
        self._num_unreported_tokens = 0
        self._num_unreported_pages = 0
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink(SessionLost(reason, is_orderly=self.member.is_draining))
        self._on_change()

    async def _run(self) -> None:
        """Until cancelled."""
        async with grpc.aio.insecure_channel(self.member.control_address, options=CHANNEL_OPTIONS) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            retry_s = FIRST_RETRY_S
            while True:
                self._connection = asyncio.create_task(self._connect(stub))
                try:
                    await asyncio.wait([self._connection])
                finally:
                    self._connection.cancel()
                    await asyncio.wait([self._connection])
                was_ready = self.is_ready
                reason = _why(self._connection)
                self._fail_all(reason)
                # A worker that is away is tried again and again; only the first time is news.
                self._log("session_lost", level=logging.INFO if was_ready else logging.DEBUG, reason=reason)
                retry_s = FIRST_RETRY_S if was_ready else min(2 * retry_s, LAST_RETRY_S)
                await asyncio.sleep(retry_s)

    async def _connect(self, stub: "worker_pb2_grpc.WorkerAsyncStub") -> None:
        """One stream from hello to its end, which is always an exception."""
        call = stub.Session()  # type: ignore[call-arg]  # the stubs know the iterator style only
        try:
            async with asyncio.timeout(self._settings.hello_timeout_s):
                await call.write(wire.write_hello(self.member, gateway_id=self._settings.gateway_id))
                welcome = await call.read()
            self._check_welcome(welcome)
            self._outbox = asyncio.Queue(self._settings.max_queued_messages)
            self.is_ready = True
            self._log("session_ready")
            self._on_change()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write(call))
                await self._read(call)
        finally:
            call.cancel()

    def _check_welcome(self, event: object) -> None:
        if not isinstance(event, worker_pb2.SessionEvent) or not event.HasField("welcome"):
            raise _Broken("the worker did not answer hello with welcome")
        worker, member = event.welcome.worker, self.member
        if (worker.worker_id, worker.epoch) != member.incarnation:
            raise _Broken(
                f"{worker.worker_id} (epoch {worker.epoch}) answered at the address of {member.incarnation}"
            )
        if worker.model.fingerprint != member.model.fingerprint:
            raise _Broken(f"the model is not the one that {member.incarnation} registered with")

    async def _write(self, call: "_SessionCall") -> None:
        while True:
            await call.write(await self._outbox.get())

    async def _read(self, call: "_SessionCall") -> None:
        read_output = wire.read_output
        while True:
            event = await call.read()
            if event is _EOF:
                raise _Broken(f"the worker ended the session: {await call.details() or await call.code()}")
            if not isinstance(event, worker_pb2.SessionEvent):
                raise _Broken("the worker sent what is no message")  # gRPC has logged the details
            sinks = self._sinks
            for message in event.step.outputs:
                sink = sinks.get(message.request_id)
                if sink is None:
                    continue  # it was aborted while this was under way
                output = read_output(message)
                if output.outcome is not None:
                    del sinks[message.request_id]
                sink(output)

    def _log(self, event: str, *, level: int = logging.INFO, **fields: Any) -> None:
        log_event(
            _log, event, level=level, worker_id=self.member.worker_id, epoch=self.member.epoch, **fields
        )


_SessionCall = grpc.aio.StreamStreamCall[worker_pb2.SessionRequest, worker_pb2.SessionEvent]


def _why(connection: asyncio.Task[None]) -> str:
    """What ended a session, for people; what should not have happened is logged with its traceback."""
    error = None if connection.cancelled() else connection.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    match error:
        case None:
            return "the session was broken off"
        case grpc.aio.AioRpcError():
            return f"{error.code().name}: {error.details()}"
        case TimeoutError():
            return "the worker did not answer hello in time"
        case _Broken():
            return str(error)
    _log.error("session_crashed", exc_info=error)
    return f"{type(error).__name__}: {error}"


class SessionPool:
    """The sessions with all members of a directory that compute, kept in step with it by `on_change`."""

    def __init__(self, settings: SessionSettings) -> None:
        self._settings = settings
        self._sessions: dict[WorkerId, WorkerSession] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._is_closed = False
        self.absences = Absences()

    def on_change(self, change: Change) -> None:
        """A listener for `MemoryDirectory.subscribe`."""
        if self._is_closed or change.member.role is Role.STORE:
            return
        member = change.member
        match change.kind:
            case ChangeKind.JOINED:
                self._sessions[member.worker_id] = WorkerSession(
                    member, settings=self._settings, on_change=self._notify, on_lost=self._lost
                )
            case ChangeKind.UPDATED:
                self._sessions[member.worker_id].update(member)
            case ChangeKind.LEFT:
                self._close(self._sessions.pop(member.worker_id), "the worker left the directory")
        self._notify()

    def sessions(self) -> tuple[WorkerSession, ...]:
        return tuple(self._sessions.values())

    def get(self, incarnation: Incarnation) -> WorkerSession | None:
        session = self._sessions.get(incarnation.worker_id)
        return session if session is not None and session.member.epoch == incarnation.epoch else None

    def is_ready(self, incarnation: Incarnation) -> bool:
        session = self.get(incarnation)
        return session is not None and session.is_ready

    async def wait_for_change(self) -> None:
        """Until a worker joins, leaves or reports, or a session becomes ready or is lost."""
        await self._changed.wait()

    async def close(self) -> None:
        """Every request that is left is told so; afterwards no task and no socket is left, nor comes a new one."""
        self._is_closed = True
        self.absences.clear()
        for session in self._sessions.values():
            self._close(session, "the gateway is stopping")
        self._sessions.clear()
        if self._closing:
            await asyncio.wait(self._closing)

    def _close(self, session: WorkerSession, reason: str) -> None:
        session.close(reason)
        self._closing.add(session.task)
        session.task.add_done_callback(self._closing.discard)

    def _lost(self, member: Member) -> None:
        if member.role.can_decode and not self._is_closed:
            self.absences.note(member.model, now_s=asyncio.get_running_loop().time())

    def _notify(self) -> None:
        # Those who wait have the old event; who waits from now on waits for the next change.
        self._changed.set()
        self._changed = asyncio.Event()
