"""Sends an answer to a client that may read slowly, stop reading, or leave."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from control_plane.errors import RequestError
from control_plane.gateway.choices import Delta
from control_plane.gateway.failures import ClientStalled, error_body
from control_plane.gateway.formats import DONE_EVENT, AnswerFormat, error_event
from control_plane.gateway.intake import Job
from control_plane.gateway.metrics import GatewayMetrics
from control_plane.gateway.timeline import RequestTimeline

T = TypeVar("T")
ABORT_EXTENSION = "penstock.abort"  # scope["extensions"]: a function that resets the connection
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies that know it do not collect events
]


class AnswerResponse(Response):
    """Runs a job and writes its answer. The client's leaving closes the job, so that no pool works for nobody.

    Errors before the first byte propagate and become an error response; later ones become an event and end the stream.
    """

    def __init__(
        self,
        job: Job,
        *,
        deltas: AsyncGenerator[Delta, None],
        format_: AnswerFormat,
        timeline: RequestTimeline,
        metrics: GatewayMetrics,
        write_timeout_s: float,
    ) -> None:
        self._job = job
        self._deltas = deltas
        self._format = format_
        self._timeline = timeline
        self._metrics = metrics
        self._write_timeout_s = write_timeout_s
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._deltas):
            if self._job.stream:
                guard = StallGuard(send, timeout_s=self._write_timeout_s)
                try:
                    await unless_disconnected(receive, guard.run(self._stream(guard.send)))
                except ClientStalled as error:
                    self._timeline.failed(error.message)
                    if (abort := scope.get("extensions", {}).get(ABORT_EXTENSION)) is not None:
                        abort()
                        await _disconnected(receive)
                    raise ClientDisconnect from None
            else:
                body = await unless_disconnected(receive, self._collect())
                await _send_json(body, send)

    async def _collect(self) -> bytes:
        deltas = []
        async for delta in self._deltas:
            self._timeline.tokens(delta)
            deltas.append(delta)
        return json.dumps(self._format.body(deltas, self._timeline.usage())).encode()

    async def _stream(self, send: Send) -> None:
        deltas, timeline, format_ = self._deltas, self._timeline, self._format
        first = await anext(deltas)  # what fails by now still gets its status code
        timeline.tokens(first)
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        with self._metrics.open_streams.track_inprogress():
            await send(_part(format_.opening_events() + format_.event(first)))
            try:
                async for delta in deltas:
                    timeline.tokens(delta)
                    if event := format_.event(delta):
                        await send({"type": "http.response.body", "body": event, "more_body": True})
            except RequestError as error:
                timeline.failed(error.message)
                await send(_part(error_event(error_body(error)), more=False))
                return
            usage = format_.usage_event(timeline.usage()) if self._job.include_usage else b""
            await send(_part(usage + DONE_EVENT, more=False))


class StallGuard:
    """Watches over sends: one that takes longer than `timeout_s` cancels the work and raises `ClientStalled`.

    One timer per stream, not per send: a send costs two assignments.
    """

    def __init__(self, send: Send, *, timeout_s: float) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._sending_since_s: float | None = None
        self._stalled = False

    async def send(self, message: Message) -> None:
        self._sending_since_s = self._loop.time()
        await self._send(message)
        self._sending_since_s = None

    async def run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.current_task()
        assert task is not None, "run is awaited in a task"
        self._cancel = task.cancel
        self._timer = self._loop.call_later(self._timeout_s, self._check)
        try:
            await work
        except asyncio.CancelledError:
            if not self._stalled:
                raise
            raise ClientStalled(f"The client read nothing for {self._timeout_s:g} s.") from None
        finally:
            self._timer.cancel()

    def _check(self) -> None:
        now_s = self._loop.time()
        since_s = now_s if self._sending_since_s is None else self._sending_since_s
        if now_s - since_s >= self._timeout_s:
            self._stalled = True
            self._cancel()
        else:
            self._timer = self._loop.call_at(since_s + self._timeout_s, self._check)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves: then `ClientDisconnect`.

    The body has been received before.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_json(body: bytes, send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send(_part(body, more=False))


def _part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}
