"""What gateways say of themselves: whether they are ready, and whether they share their directory through Redis."""

from collections.abc import Sequence

import httpx

from control_plane.cli.failures import say_error
from control_plane.runtimes.state import GatewayState

READY = "ready"
_TIMEOUT_S = 2.0
_REDIS_AWAY = "penstock_directory_redis_up 0.0"


def ask_health(gateway: GatewayState) -> str:
    """READY, "not ready" or why it cannot be asked."""
    try:
        response = httpx.get(f"{gateway.http_url}/ready", timeout=_TIMEOUT_S, trust_env=False)
    except httpx.TransportError as e:
        return f"does not answer: {e or type(e).__name__}"
    return READY if response.status_code == 200 else "not ready"


def warn_without_redis(gateways: Sequence[GatewayState]) -> None:
    """A line for each gateway that says that Redis is away; none for one that needs no Redis or does not answer."""
    for gateway in gateways:
        if _REDIS_AWAY in _metrics(gateway).splitlines():
            say_error(
                f"{gateway.name} does not reach Redis: it serves, but shares neither workers nor blocks "
                "with other gateways"
            )


def _metrics(gateway: GatewayState) -> str:
    try:
        response = httpx.get(f"{gateway.http_url}/metrics", timeout=_TIMEOUT_S, trust_env=False)
    except httpx.TransportError:
        return ""
    return response.text
