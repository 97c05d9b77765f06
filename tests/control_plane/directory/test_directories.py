"""What holds of every directory: of the embedded one, and of the one that gateways share through Redis.

Workers speak to `here`; what it makes of that is looked at `there`, which without Redis is the same gateway.
"""

import time

import pytest

from control_plane.directory.errors import StaleEpoch
from tests.control_plane.directory.conftest import TTL_S, Gateway, Site, make_member


async def two_ends(site: Site) -> tuple[Gateway, Gateway]:
    here = site.gateway()
    there = site.gateway() if site.redis is not None else here
    await site.linked(here, there)
    return here, there


async def test_a_worker_that_registers_is_known_with_its_load_and_its_blocks(any_site: Site) -> None:
    here, there = await two_ends(any_site)
    worker = any_site.worker(here)
    worker.num_running = 7
    worker.hold(1, 2, 3)
    await any_site.until(lambda: there.knows(worker))
    await any_site.until(lambda: there.num_blocks(worker, 1, 2, 3) == 3)
    member = there.memory.get(worker.member.worker_id)
    assert member is not None
    assert (member.load.num_running, member.model) == (7, worker.member.model)
    worker.hold(4)
    await any_site.until(lambda: there.num_blocks(worker, 1, 2, 3, 4) == 4)


async def test_a_worker_that_says_goodbye_is_gone_at_once(any_site: Site) -> None:
    here, there = await two_ends(any_site)
    worker = any_site.worker(here)
    worker.hold(1)
    await any_site.until(lambda: there.num_blocks(worker, 1) == 1)
    await worker.fall_silent()
    left_s = time.monotonic()
    here.directory.deregister(worker.member.incarnation)
    await any_site.until(lambda: not there.knows(worker))
    assert time.monotonic() - left_s < TTL_S
    assert there.memory.blocks.is_empty


async def test_a_worker_that_falls_silent_is_let_go_and_the_others_stay(any_site: Site) -> None:
    here, there = await two_ends(any_site)
    silent, alive = any_site.worker(here, "silent"), any_site.worker(here, "alive")
    await any_site.until(lambda: there.knows(silent) and there.knows(alive))
    await silent.fall_silent()
    await any_site.until(lambda: not there.knows(silent) and not here.knows(silent))
    assert there.knows(alive)


async def test_a_new_incarnation_takes_the_place_of_the_old_one_which_is_refused(any_site: Site) -> None:
    here, there = await two_ends(any_site)
    old = any_site.worker(here, epoch=9)
    old.hold(1)
    await any_site.until(lambda: there.num_blocks(old, 1) == 1)
    await old.fall_silent()
    new = any_site.worker(here, epoch=4)
    await any_site.until(lambda: there.knows(new))
    assert there.num_blocks(new, 1) == 0
    for gateway in (here, there):
        with pytest.raises(StaleEpoch, match="epoch 4"):
            gateway.directory.register(make_member(epoch=9), now_s=time.monotonic())
        old.gateway = gateway
        with pytest.raises(StaleEpoch, match="epoch 4"):
            old.beat()


async def test_many_blocks_arrive_whole(any_site: Site) -> None:
    here, there = await two_ends(any_site)
    worker = any_site.worker(here)
    worker.hold(*range(1, 1500))
    await any_site.until(lambda: there.num_blocks(worker, *range(1, 1500)) == 1499)


async def test_registering_again_is_no_second_join(any_site: Site) -> None:
    here, there = await two_ends(any_site)
    worker = any_site.worker(here)
    worker.hold(1)
    await any_site.until(lambda: there.num_blocks(worker, 1) == 1)
    kinds = []
    there.memory.subscribe(lambda change: kinds.append(change.kind.value))
    worker.register()
    await any_site.until(lambda: len(kinds) > 5)
    assert set(kinds) == {"updated"}
    await any_site.until(lambda: there.num_blocks(worker, 1) == 1)


async def test_a_worker_may_go_and_come_back(any_site: Site) -> None:
    here, there = await two_ends(any_site)
    worker = any_site.worker(here)
    await any_site.until(lambda: there.knows(worker))
    await worker.fall_silent()
    await any_site.until(lambda: not there.knows(worker) and not here.knows(worker))
    again = any_site.worker(here)
    await any_site.until(lambda: there.knows(again))
