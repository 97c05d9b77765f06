"""What gateways say of their running requests, and asking one of them to move one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

from control_plane.cli.failures import CommandFailed
from control_plane.runtimes.state import GatewayState

_PATH = "/admin/requests"
_TIMEOUT_S = 2.0
# Longer than gateways try: how it ended is what the command is there to say.
_MOVE_TIMEOUT_S = 3700.0

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Requests:
    """`running`: the oldest first. `recent_moves`: the newest last. `silent`: gateways that do not answer, and why."""

    running: list[Json]
    recent_moves: list[Json]
    silent: dict[str, str]


def fetch_requests(gateways: Sequence[GatewayState]) -> Requests:
    """Of all gateways together."""
    found = Requests([], [], {})
    for gateway in gateways:
        try:
            reply = httpx.get(f"{gateway.http_url}{_PATH}", timeout=_TIMEOUT_S, trust_env=False)
            reply.raise_for_status()
            body = reply.json()
        except (httpx.HTTPError, ValueError) as e:
            found.silent[gateway.name] = str(e) or type(e).__name__
            continue
        found.running.extend(body["requests"])
        found.recent_moves.extend(body["recent_moves"])
    found.running.sort(key=lambda request: -float(request["age_s"]))
    found.recent_moves.sort(key=lambda move: float(move["ended_unix_s"]))
    return found


def move_request(gateways: Sequence[GatewayState], request_id: str, *, worker_id: str) -> Json:
    """The report of the gateway that has the request. Raises CommandFailed where it was not tried."""
    failure = f"no request {request_id!r} runs here; penstock top lists those that do"
    for gateway in gateways:
        url = f"{gateway.http_url}{_PATH}/{quote(request_id, safe='')}/move"
        try:
            reply = httpx.post(url, json={"worker": worker_id}, timeout=_MOVE_TIMEOUT_S, trust_env=False)
            body = reply.json()
        except (httpx.HTTPError, ValueError) as e:
            failure = f"{gateway.name} does not answer: {e or type(e).__name__}"
            continue
        if reply.status_code == 200:
            return dict(body)
        if body["error"]["code"] != "request_not_found":
            raise CommandFailed(body["error"]["message"])
    raise CommandFailed(failure)
