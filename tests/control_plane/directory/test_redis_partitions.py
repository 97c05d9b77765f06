"""One gateway's way to Redis freezes, breaks or is slow while the others' goes on: each serves, and all heals."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvstore.addresses import UnixAddress
from tests.control_plane.directory.conftest import Gateway, Site, Worker
from tests.control_plane.directory.sharing import heals, outlive_the_ttl, until_down
from tests.relay import Relay


@dataclass(frozen=True, slots=True)
class Split:
    """`far` reaches Redis through `relay`, `near` as always; each has a worker, and both know both."""

    site: Site
    relay: Relay
    far: Gateway
    near: Gateway
    far_worker: Worker
    near_worker: Worker


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    made = Relay()
    yield made
    await made.close()


@pytest.fixture
async def split(relay: Relay, site: Site, tmp_path: Path) -> AsyncIterator[Split]:
    """The relay comes first and goes last: no gateway is in the middle of a connection that ends with the test."""
    assert site.redis is not None
    await relay.start_unix(UnixAddress(path=site.redis.url.removeprefix("unix://")), str(tmp_path / "relay"))
    far, near = site.gateway(f"unix://{tmp_path / 'relay'}"), site.gateway()
    await site.linked(far, near)
    far_worker, near_worker = site.worker(far, "far"), site.worker(near, "near")
    far_worker.hold(1, 2)
    near_worker.hold(1, 2)
    await site.until(lambda: near.num_blocks(far_worker, 1, 2) == far.num_blocks(near_worker, 1, 2) == 2)
    yield Split(site, relay, far, near, far_worker, near_worker)
    relay.thaw()


async def freeze(split: Split) -> None:
    split.relay.freeze()


async def cut_and_freeze(split: Split) -> None:
    split.relay.freeze()
    await split.relay.cut()


async def are_apart(split: Split) -> None:
    """Neither hears of what the other one's worker computes, and neither forgets what it knew."""
    await until_down(split.site, split.far)
    assert split.near.link is not None
    split.far_worker.hold(7)
    split.near_worker.hold(8)
    for worker in (split.far_worker, split.near_worker):
        await outlive_the_ttl(split.site, worker.gateway, worker=worker)
    assert split.near.link.is_up
    assert (split.far.num_blocks(split.far_worker, 7), split.near.num_blocks(split.near_worker, 8)) == (1, 1)
    assert (split.near.num_blocks(split.far_worker, 7), split.far.num_blocks(split.near_worker, 8)) == (0, 0)


async def are_one_again(split: Split) -> None:
    await split.site.until(
        lambda: split.near.num_blocks(split.far_worker, 7) == split.far.num_blocks(split.near_worker, 8) == 1
    )
    await heals(split.site, split.near, split.far_worker)
    await heals(split.site, split.far, split.near_worker)


@pytest.mark.parametrize("fault", [freeze, cut_and_freeze])
async def test_a_gateway_that_loses_redis_alone_serves_its_workers_and_the_other_one_its_own(
    split: Split, fault: Callable[[Split], Awaitable[None]]
) -> None:
    await fault(split)
    await are_apart(split)
    split.relay.thaw()
    await are_one_again(split)


async def test_what_redis_lost_while_one_was_away_is_told_again_by_both(split: Split) -> None:
    assert split.site.redis is not None
    split.relay.freeze()
    await are_apart(split)
    split.site.redis.kill()
    await until_down(split.site, split.near)
    split.site.redis.start()
    await split.site.linked(split.near)
    split.relay.thaw()
    await split.relay.cut()  # to a Redis that is no more
    await are_one_again(split)


async def test_an_answer_that_breaks_off_in_the_middle_is_asked_for_again(split: Split) -> None:
    split.relay.hold_after(100)
    for number in range(10, 30):
        split.near_worker.hold(number)
    await asyncio.wait_for(split.relay.is_holding.wait(), 10.0)
    await split.relay.cut()
    split.relay.thaw()
    await split.site.until(lambda: split.far.num_blocks(split.near_worker, *range(10, 30)) == 20)
    await heals(split.site, split.far, split.near_worker)


async def test_a_slow_redis_delays_news_and_nothing_else(split: Split) -> None:
    split.relay.delay_s = 0.05  # of every answer; a call may take 0.2
    started_s = time.monotonic()
    split.far_worker.beat()
    assert time.monotonic() - started_s < 0.05
    for number in range(10, 20):
        split.far_worker.hold(number)
        split.near_worker.hold(number)
    await split.site.until(lambda: split.near.num_blocks(split.far_worker, *range(10, 20)) == 10)
    await split.site.until(lambda: split.far.num_blocks(split.near_worker, *range(10, 20)) == 10)
    assert split.far.link is not None
    assert split.far.link.is_up


async def test_two_gateways_fill_a_redis_that_was_full_and_came_back_empty(split: Split) -> None:
    assert split.site.redis is not None
    split.site.redis.fill()
    split.far_worker.hold(7)
    split.near_worker.hold(8)
    for worker in (split.far_worker, split.near_worker):
        await outlive_the_ttl(split.site, split.far, split.near, worker=worker)
    assert (split.near.num_blocks(split.far_worker, 7), split.far.num_blocks(split.near_worker, 8)) == (0, 0)
    split.site.redis.kill()
    split.site.redis.start()
    await are_one_again(split)
