"""Redis killed, frozen, full, emptied or of no use: serving goes on, and all heals."""

import asyncio
import logging
import time

import pytest

from tests.control_plane.directory.conftest import Site
from tests.control_plane.directory.sharing import heals, outlive_the_ttl, shared, until_down


async def test_while_redis_is_gone_nobody_is_dropped_and_an_empty_one_is_filled_again(site: Site) -> None:
    a, b, worker = await shared(site)
    site.redis.kill()
    await until_down(site, a, b)
    worker.hold(7)
    await outlive_the_ttl(site, a, b, worker=worker)
    assert (a.num_blocks(worker, 7), b.num_blocks(worker, 7)) == (1, 0)
    assert b.num_blocks(worker, 1, 2) == 2
    newcomer = site.worker(b, "newcomer")
    site.redis.start()
    await site.until(lambda: b.num_blocks(worker, 7) == 1 and a.knows(newcomer))
    await heals(site, b, worker)


async def test_a_worker_that_moves_while_redis_is_gone_stays_where_it_is_reached(site: Site) -> None:
    a, b, worker = await shared(site)
    site.reached.add(worker.member.incarnation)
    site.redis.kill()
    await until_down(site, a, b)
    worker.gateway = b
    await outlive_the_ttl(site, a, b, worker=worker)
    site.redis.start()
    await heals(site, a, worker)
    await outlive_the_ttl(site, a, b, worker=worker)
    await worker.fall_silent()
    await site.until(lambda: not a.knows(worker) and not b.knows(worker))


async def test_a_worker_that_dies_while_redis_is_gone_is_dropped_where_it_reported(site: Site) -> None:
    a, b, worker = await shared(site)
    site.redis.kill()
    await until_down(site, a, b)
    await worker.fall_silent()
    await site.until(lambda: not a.knows(worker))


async def test_a_frozen_redis_holds_up_nobody(site: Site) -> None:
    a, b, worker = await shared(site)
    site.redis.freeze()
    try:
        started_s = time.monotonic()
        worker.beat()
        assert time.monotonic() - started_s < 0.1
        await until_down(site, a, b)
        await outlive_the_ttl(site, a, b, worker=worker)
    finally:
        site.redis.thaw()
    await heals(site, b, worker)


async def test_a_full_redis_drops_nobody_and_is_used_again_once_it_has_room(site: Site) -> None:
    a, b, worker = await shared(site)
    site.redis.fill()
    worker.hold(7)
    await outlive_the_ttl(site, a, b, worker=worker)
    assert b.num_blocks(worker, 7) == 0
    site.redis.empty_out()
    await site.until(lambda: b.num_blocks(worker, 7) == 1)
    await heals(site, b, worker)


async def test_an_emptied_redis_is_noticed_by_what_is_missing(site: Site) -> None:
    _, b, worker = await shared(site)
    with site.redis.client() as client:
        for number in range(10, 20):
            worker.hold(number)
            worker.beat()
            client.flushall()
            await asyncio.sleep(0.01)
    await site.until(lambda: b.num_blocks(worker, *range(10, 20)) == 10)
    await heals(site, b, worker)


async def test_a_redis_that_cannot_be_used_is_tried_again_but_not_without_pause(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    with site.redis.client() as client:
        client.set("test:stream", "no stream at all")
    caplog.set_level(logging.DEBUG, "control_plane.directory.redis_link")  # only the first time is a warning
    started_s = time.monotonic()
    a, b = site.gateway(), site.gateway()
    worker = site.worker(a)
    worker.hold(1, 2)
    await site.until(lambda: a.num_blocks(worker, 1, 2) == 2)
    await site.until(lambda: [record.message for record in caplog.records].count("redis_away") >= 10)
    assert time.monotonic() - started_s > 1.0
    with site.redis.client() as client:
        client.delete("test:stream")
    await heals(site, b, worker)
