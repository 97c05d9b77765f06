"""Gateways that come and go, workers that change theirs, and what goes through the stream between them."""

import asyncio
import time

import pytest
from redis import Redis

from control_plane.directory import redis_directory
from control_plane.directory.redis_directory import RedisDirectory
from tests.control_plane.directory.conftest import Site
from tests.control_plane.directory.sharing import heals, outlive_the_ttl, shared, two_gateways


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


async def test_many_gateways_that_start_at_once_ask_a_worker_for_its_blocks_once_in_a_ttl(site: Site) -> None:
    a, _, worker = await shared(site)
    started_s, num_before = time.monotonic(), worker.num_snapshots
    late = [site.gateway() for _ in range(8)]
    await site.until(lambda: all(gateway.num_blocks(worker, 1, 2) == 2 for gateway in late))
    num_ttls = (time.monotonic() - started_s) / a.memory.ttl_s
    assert worker.num_snapshots - num_before <= num_ttls + 1


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

    await site.until(lambda: first.is_refused != second.is_refused)
    await site.until(agreed)
    newest = second if first.is_refused else first
    await outlive_the_ttl(site, a, b, worker=newest)
    assert not newest.is_refused


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
