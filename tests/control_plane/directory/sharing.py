"""Two gateways, a worker of the first, and what must hold between them."""

import asyncio
import time

from tests.control_plane.directory.conftest import TTL_S, Gateway, Site, Worker


async def two_gateways(site: Site) -> tuple[Gateway, Gateway]:
    a, b = site.gateway(), site.gateway()
    await site.linked(a, b)
    return a, b


async def shared(site: Site) -> tuple[Gateway, Gateway, Worker]:
    """Two gateways and a worker of the first, whom both know with blocks 1 and 2."""
    a, b = await two_gateways(site)
    worker = site.worker(a)
    worker.hold(1, 2)
    await site.until(lambda: b.num_blocks(worker, 1, 2) == 2)
    return a, b, worker


async def outlive_the_ttl(site: Site, *gateways: Gateway, worker: Worker) -> None:
    """Everybody still knows the worker after several times the silence that would drop it."""
    end_s = time.monotonic() + 3 * TTL_S
    while time.monotonic() < end_s:
        assert all(gateway.knows(worker) for gateway in gateways)
        await asyncio.sleep(0.01)


async def until_down(site: Site, *gateways: Gateway) -> None:
    await site.until(lambda: not any(gateway.link is not None and gateway.link.is_up for gateway in gateways))


async def heals(site: Site, gateway: Gateway, worker: Worker) -> None:
    worker.hold(3)
    await site.until(lambda: gateway.num_blocks(worker, 1, 2, 3) == 3)
    assert worker.num_registrations == 1
