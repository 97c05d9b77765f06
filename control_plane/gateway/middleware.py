"""Around every HTTP request: an id, a timeline, a count, a log line."""

import re
import secrets

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from control_plane.gateway.metrics import GatewayMetrics
from control_plane.gateway.timeline import RequestTimeline

_CLIENT_CLOSED = "499"  # nginx's code for a client that left before the answer
_GOOD_REQUEST_ID = re.compile(rb"[!-~]{1,128}")  # visible ASCII: safe in a header and in a log


class RequestScope:
    """Pure ASGI, since a stream passes through it event by event.

    Puts the `RequestTimeline` into the request's state.
    """

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        timeline = RequestTimeline(
            self._metrics, protocol="http", operation=scope["path"], request_id=request_id
        )
        scope.setdefault("state", {})["timeline"] = timeline
        header = (b"x-request-id", request_id.encode())
        code = "500"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                nonlocal code
                code = str(message["status"])
                message["headers"] = [*message["headers"], header]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            code = _CLIENT_CLOSED
        except Exception as error:
            timeline.failed(repr(error))
            code = "500"
            raise
        finally:
            timeline.closed(code)


def _request_id(scope: Scope) -> str:
    """The client's own id, if it is harmless; else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _GOOD_REQUEST_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return f"req-{secrets.token_hex(16)}"
