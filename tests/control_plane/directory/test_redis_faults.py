"""Redis killed, emptied, frozen, full or forgetful, and gateways that come and go: serving goes on, and all heals."""

import asyncio
import time

import pytest
from redis import Redis

from control_plane.directory import redis_directory
from control_plane.directory.redis_directory import RedisDirectory
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
    end_s = time.monotonic() + 4 * TTL_S
    while time.monotonic() < end_s:
        assert all(gateway.knows(worker) for gateway in gateways)
        await asyncio.sleep(0.01)


async def until_down(site: Site, *gateways: Gateway) -> None:
    await site.until(lambda: not any(gateway.link is not None and gateway.link.is_up for gateway in gateways))


async def heals(site: Site, gateway: Gateway, worker: Worker) -> None:
    worker.hold(3)
    await site.until(lambda: gateway.num_blocks(worker, 1, 2, 3) == 3)
    assert worker.num_registrations == 1


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


async def test_a_gateway_that_lags_behind_the_end_of_the_stream_asks_again(site: Site) -> None:
    a, b, worker = await shared(site)
    assert a.link is not None
    with site.redis.client() as client:
        # As if the reader were too slow: what is written in one go is trimmed in the same go.
        for number in range(10, 20):
            worker.hold(number)
            worker.beat()
            client.delete("test:stream")
            await asyncio.sleep(0.005)
            client.xtrim("test:stream", maxlen=0)
    await site.until(lambda: b.num_blocks(worker, *range(10, 20)) == 10)


async def test_a_gateway_that_starts_later_knows_everybody(site: Site) -> None:
    a = site.gateway()
    worker = site.worker(a)
    worker.hold(1, 2)
    await site.linked(a)
    late = site.gateway()
    await site.until(lambda: late.num_blocks(worker, 1, 2) == 2)
    assert worker.num_registrations == 1


async def test_gateways_that_start_without_redis_serve_and_find_each_other_later(site: Site) -> None:
    site.redis.kill()
    a, b = site.gateway(), site.gateway()
    worker = site.worker(a)
    worker.hold(1, 2)
    await site.until(lambda: a.num_blocks(worker, 1, 2) == 2)
    assert not b.knows(worker)
    site.redis.start()
    await heals(site, b, worker)


async def test_a_worker_that_changes_its_gateway_need_not_register_nor_send_all_again(site: Site) -> None:
    a, b, worker = await shared(site)
    left: list[str] = []
    for gateway in (a, b):
        gateway.memory.subscribe(
            lambda change: left.append(change.kind.value) if change.kind.value != "updated" else None
        )
    worker.gateway = b
    worker.hold(3)
    await site.until(lambda: a.num_blocks(worker, 1, 2, 3) == b.num_blocks(worker, 1, 2, 3) == 3)
    await outlive_the_ttl(site, a, b, worker=worker)
    assert worker.num_registrations == 1
    assert left == []


async def test_the_workers_of_a_killed_gateway_go_to_another_and_nobody_notices(site: Site) -> None:
    a, b, worker = await shared(site)
    c = site.gateway()
    await site.until(lambda: c.num_blocks(worker, 1, 2) == 2)
    await a.stop()
    worker.gateway = b
    await outlive_the_ttl(site, b, c, worker=worker)
    await heals(site, c, worker)


async def test_of_two_incarnations_that_register_at_two_gateways_at_once_one_remains(site: Site) -> None:
    a, b = await two_gateways(site)
    first, second = site.worker(a, epoch=11), site.worker(b, epoch=22)

    def agreed() -> bool:
        epochs = {gateway.memory.members()[0].epoch for gateway in (a, b) if gateway.memory.members()}
        return len(epochs) == 1

    await site.until(lambda: first._task.done() or second._task.done())
    await site.until(agreed)
    for worker in (first, second):
        if worker._task.done():
            worker._task.exception()  # it was told that it is the stale one


async def test_every_key_has_an_end(site: Site) -> None:
    _, _, worker = await shared(site)
    with site.redis.client() as client:
        keys = set(client.scan_iter("*"))
        assert keys == {b"test:stream", b"test:epochs:" + worker.member.worker_id.encode()}
        assert all(0 < client.ttl(key) <= 3600 for key in keys)


async def test_what_cannot_be_written_in_time_is_dropped_and_asked_for(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_directory, "MAX_WAITING_ENTRIES", 4)
    a, b, worker = await shared(site)
    for number in range(10, 40):
        worker.hold(number)
        worker.beat()  # without a turn of the loop: nothing is written in between
    assert isinstance(a.directory, RedisDirectory)
    a.directory.check()
    await site.until(lambda: b.num_blocks(worker, *range(10, 40)) == 30)


async def test_what_others_write_into_the_stream_is_passed_over(site: Site) -> None:
    _, b, worker = await shared(site)
    client: Redis
    with site.redis.client() as client:
        client.xadd("test:stream", {"who": "a stranger"})
        client.xadd("test:stream", {"g": "x", "n": "1", "k": "nonsense", "b": ""})
        client.xadd("test:stream", {"g": "x", "n": "one", "k": "here", "b": ""})
        client.xadd("test:stream", {"g": "x", "n": "2", "k": "heartbeat", "b": b"\xff\xff"})
        client.xadd("test:stream", {"g": "x", "n": "3", "k": "register", "b": b""})
    await heals(site, b, worker)


async def test_a_redis_that_cannot_be_used_is_tried_again_but_not_without_pause(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    with site.redis.client() as client:
        client.set("test:stream", "no stream at all")
    a, b = site.gateway(), site.gateway()
    worker = site.worker(a)
    worker.hold(1, 2)
    await site.until(lambda: a.num_blocks(worker, 1, 2) == 2)
    await asyncio.sleep(1.0)
    assert len([record for record in caplog.records if record.message == "redis_away"]) < 20
    with site.redis.client() as client:
        client.delete("test:stream")
    await heals(site, b, worker)
