"""A worker without an engine: a real gRPC server whose tokens are a function of the prompt and their number.

It does what the test tells it: answers everything at once, a few tokens and then nothing, or nothing at all; it
can break its sessions, hold back its welcome and send whatever bytes it is given.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc

from control_plane.directory.member import Member
from control_plane.directory.wire import read_member
from kvstore.blocks import FORMAT_VERSION
from protos import worker_pb2

WAIT_S = 10.0


def token_of(prompt_token_ids: list[int], number: int) -> int:
    """Equal on all workers, as it is for real ones: the draw depends on the request and the number alone."""
    return (sum(prompt_token_ids) * 31 + number * 17) % 50_000


def expected_tokens(prompt_token_ids: list[int], num_tokens: int) -> list[int]:
    return [token_of(prompt_token_ids, number) for number in range(num_tokens)]


class _Session:
    def __init__(self) -> None:
        self.outbox: asyncio.Queue[worker_pb2.SessionEvent | bytes | None] = asyncio.Queue()
        self.running: dict[str, worker_pb2.Submit] = {}


class FakeWorker:
    """`max_answer_tokens`: of every request; None: all of them and the end. `refusal`: sent instead of tokens."""

    def __init__(
        self,
        worker_id: str,
        *,
        role: int = worker_pb2.ROLE_DECODE,
        epoch: int = 1,
        fingerprint: bytes = b"model-a",
        max_answer_tokens: int | None = None,
    ) -> None:
        self.max_answer_tokens = max_answer_tokens
        self.refusal: worker_pb2.Failure | None = None
        self.welcomes = asyncio.Event()
        self.welcomes.set()
        self.description = worker_pb2.WorkerDescription(
            worker_id=worker_id,
            epoch=epoch,
            role=role,
            data_address="tcp://127.0.0.1:1",
            block_format=FORMAT_VERSION,
            model=worker_pb2.ModelDescription(
                name="fake",
                fingerprint=fingerprint,
                max_model_len=4096,
                vocab_size=50_000,
                layout=worker_pb2.KvLayout(
                    num_layers=1, num_kv_heads=1, head_dim=8, block_size_tokens=16, dtype="float32"
                ),
            ),
            load=worker_pb2.WorkerLoad(num_pages=1024, num_free_pages=1024),
        )
        self.welcome = worker_pb2.WorkerDescription()
        self.welcome.CopyFrom(self.description)
        self.hellos: list[worker_pb2.Hello] = []
        self.submits: list[worker_pb2.Submit] = []
        self.aborts: list[str] = []
        self._sessions: set[_Session] = set()
        self._changed = asyncio.Condition()
        self._server: grpc.aio.Server | None = None

    @property
    def member(self) -> Member:
        return read_member(self.description)

    @property
    def num_running(self) -> int:
        return sum(len(session.running) for session in self._sessions)

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    async def start(self) -> None:
        self._server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
            )
        )
        handler = grpc.stream_stream_rpc_method_handler(
            self._session,
            request_deserializer=worker_pb2.SessionRequest.FromString,
            response_serializer=lambda event: (
                event if isinstance(event, bytes) else event.SerializeToString()
            ),
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("penstock.worker.v1.Worker", {"Session": handler}),)
        )
        # A worker that is started again keeps its address.
        port = self._server.add_insecure_port(self.description.control_address or "127.0.0.1:0")
        self.description.control_address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        """As a killed process: every connection breaks at once."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(grace=None)

    def break_sessions(self) -> None:
        """The streams end, the server stays."""
        for session in self._sessions:
            session.outbox.put_nowait(None)

    def send(self, event: worker_pb2.SessionEvent | bytes) -> None:
        for session in self._sessions:
            session.outbox.put_nowait(event)

    def output(self, request_id: str, token_ids: list[int], *, first: int, **fields: object) -> None:
        """One output in a step of its own."""
        output = worker_pb2.Output(
            request_id=request_id, first_token_number=first, token_ids=token_ids, **fields
        )
        self.send(worker_pb2.SessionEvent(step=worker_pb2.Step(number=1, outputs=[output])))

    def go_on(self, submit: worker_pb2.Submit, *, first: int, num_tokens: int, finish: bool = False) -> None:
        """Sends the right tokens from number `first` on."""
        prompt = list(submit.prompt_token_ids)
        for number in range(first, first + num_tokens):
            is_last = finish and number == first + num_tokens - 1
            reason = worker_pb2.FINISH_LENGTH if is_last else worker_pb2.FINISH_NONE
            self.output(submit.request_id, [token_of(prompt, number)], first=number, finish_reason=reason)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Waits until something holds that only messages to this worker change."""
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(holds)

    async def _session(
        self, requests: AsyncIterator[worker_pb2.SessionRequest], context: object
    ) -> AsyncIterator[worker_pb2.SessionEvent | bytes]:
        first = await anext(aiter(requests))
        self.hellos.append(first.hello)
        await self._notify()
        await self.welcomes.wait()
        yield worker_pb2.SessionEvent(welcome=worker_pb2.Welcome(worker=self.welcome))
        session = _Session()
        self._sessions.add(session)
        reader = asyncio.create_task(self._read(requests, session))
        await self._notify()
        try:
            while (event := await session.outbox.get()) is not None:
                yield event
        finally:
            self._sessions.discard(session)
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.RpcError):
                await reader
            await self._notify()

    async def _read(self, requests: AsyncIterator[worker_pb2.SessionRequest], session: _Session) -> None:
        async for request in requests:
            if request.HasField("submit"):
                self.submits.append(request.submit)
                session.running[request.submit.request_id] = request.submit
                self._answer(request.submit, session)
            elif request.HasField("abort"):
                self.aborts.append(request.abort.request_id)
                session.running.pop(request.abort.request_id, None)
            await self._notify()
        session.outbox.put_nowait(None)

    def _answer(self, submit: worker_pb2.Submit, session: _Session) -> None:
        if self.refusal is not None:
            session.running.pop(submit.request_id)
            self.output(
                submit.request_id,
                [],
                first=0,
                finish_reason=worker_pb2.FINISH_ERROR,
                failure=self.refusal,
            )
            return
        first = len(submit.output_token_ids)
        num_tokens = submit.sampling.max_tokens - first
        if self.max_answer_tokens is not None:
            num_tokens = min(num_tokens, self.max_answer_tokens)
        if submit.purpose == worker_pb2.Submit.PREFILL_ONLY:
            self.go_on(submit, first=0, num_tokens=min(1, num_tokens))
            return
        finish = first + num_tokens == submit.sampling.max_tokens
        self.go_on(submit, first=first, num_tokens=num_tokens, finish=finish)
        if finish:
            session.running.pop(submit.request_id)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
