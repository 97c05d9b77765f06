"""Hand-overs that wait for each other end long before their leases do."""

import asyncio
from typing import Any

from kvstore.blocks import BlockKey
from protos import worker_pb2
from tests.workers.conftest import OpenSession, StartWorker
from tests.workers.handoff_ends import wait_until
from tests.workers.stepping import LIMITS, SOURCE, new_request, new_state, step
from workers.config import Role
from workers.pages import CachedBlock, PagePool
from workers.request import PageId, Purpose, Request, RequestId, SamplingParams, SessionId
from workers.rings import find_ring
from workers.scheduler import schedule

PREFILL_ONLY = worker_pb2.Submit.PREFILL_ONLY
PROMPT_A, PROMPT_B = [(7 * i) % 250 + 3 for i in range(80)], [(5 * i) % 250 + 3 for i in range(80)]
# Room for one of the prompts and not for two, and leases and pulls that outlive the test.
NARROW: dict[str, Any] = {"num_pages": 8, "lease_s": 3600.0, "pull_timeout_s": 3600.0}
SOON_S = 20.0


def request(name: str, *, num_pages: int, page_ids: tuple[int, ...] = ()) -> Request:
    return Request(
        request_id=RequestId(name),
        session_id=SessionId(1),
        prompt_token_ids=[5] * 16 * num_pages,
        sampling=SamplingParams(),
        arrival_s=0.0,
        page_ids=tuple(map(PageId, page_ids)),
    )


def pool_of(*users: Request) -> PagePool:
    pool = PagePool(10)
    for user in users:
        pool.take(user.page_ids)
    return pool


def test_what_nobody_pulls_gives_way_the_last_first_and_no_more_than_must() -> None:
    held = [request(f"h{n}", num_pages=3, page_ids=tuple(range(3 * n, 3 * n + 3))) for n in range(3)]
    waiting = [request("c", num_pages=1), request("b", num_pages=5)]
    pools = pool_of(*held)

    def giving_way(pulled: set[str]) -> tuple[str, ...] | None:
        ring = find_ring(waiting, held, pages=pools, is_pulled=pulled.__contains__)
        assert ring is None or ring.waiting.request_id == "b"
        return None if ring is None else ring.giving_way

    assert giving_way({"b"}) == ("h2", "h1")
    assert giving_way({"b", "h2"}) == ("h1", "h0")
    assert (
        giving_way({"b", "h2", "h1"}) is None
    )  # these will be had by those who pull them, and then there is room
    assert giving_way(set()) is None


def test_a_page_of_several_that_give_way_is_free_only_once_all_of_them_have() -> None:
    first, second = (request(name, num_pages=3, page_ids=(0, 1, n)) for n, name in ((2, "h0"), (3, "h1")))
    pool = pool_of(first, request("rest", num_pages=5, page_ids=(3, 5, 6, 7, 8)))
    for page_id in first.page_ids[:2]:
        pool.cache(page_id, CachedBlock(BlockKey(bytes([page_id])), BlockKey(b"root"), is_exact=True))
    pool.share(first.page_ids[:2])  # by the second
    waiting = [request("b", num_pages=5)]  # two are free, one more each of them has alone, and two they share
    ring = find_ring(waiting, [first, second], pages=pool, is_pulled={"b"}.__contains__)
    assert ring is not None
    assert ring.giving_way == ("h1", "h0")
    assert find_ring(waiting, [second], pages=pool, is_pulled={"b"}.__contains__) is None


def test_who_only_waits_behind_others_that_nobody_pulls_passes_them() -> None:
    waiting = [request("c", num_pages=99), request("b", num_pages=5)]
    ring = find_ring(waiting, [], pages=pool_of(), is_pulled={"b"}.__contains__)
    assert ring is not None
    assert (ring.waiting.request_id, ring.giving_way) == ("b", ())


def test_a_slow_load_and_a_slow_pull_are_no_ring() -> None:
    state = new_state(num_pages=8)
    held, waiting, loading, pulling = (RequestId(name) for name in ("held", "waiting", "loading", "pulling"))
    state.add(new_request(held, prompt=[1] * 64, purpose=Purpose.PREFILL_ONLY), now_s=0.0)
    step(state)
    state.add(new_request(loading, prompt=[2] * 32), now_s=0.0)
    region = state.loads.open(loading, first_block=0, end_block=1, now_s=0.0)
    assert region is not None
    state.add(new_request(pulling, prompt=[3] * 10, kv_source=SOURCE), now_s=0.0)
    state.add(new_request(waiting, prompt=[4] * 64), now_s=0.0)
    step(state)
    assert schedule(state.view(), LIMITS).is_empty
    assert state.ring({waiting}.__contains__) is None
    state.pull_failed(pulling, now_s=0.0)
    assert state.ring({waiting}.__contains__) is None
    state.loads.fail(loading, region, region.placed_block, now_s=0.0)
    ring = state.ring({waiting}.__contains__)
    assert ring is not None
    assert (ring.waiting.request_id, ring.giving_way) == (waiting, (held,))


async def test_two_workers_that_take_requests_in_different_order_do_not_wait_for_each_other(
    start_worker: StartWorker, open_session: OpenSession
) -> None:
    prefill, decode = await start_worker(Role.PREFILL, **NARROW), await start_worker(Role.DECODE, **NARROW)
    at_prefill, at_decode = await open_session(prefill), await open_session(decode)
    wanted: dict[str, Any] = {"kv_source": prefill.identity, "max_tokens": 6, "ignore_eos": True}
    # A has the pages of the prefill worker, B those of the decode worker; A then waits there, and B here.
    held = await at_prefill.submit("a", PROMPT_A, purpose=PREFILL_ONLY)
    await held.began.wait()
    b = await at_decode.submit("b", PROMPT_B, **wanted)
    await wait_until(lambda: decode.worker.state.load().num_running == 1)
    a = await at_decode.submit("a", PROMPT_A, **wanted)
    await at_prefill.submit("b", PROMPT_B, purpose=PREFILL_ONLY)
    async with asyncio.timeout(SOON_S):
        assert len((await b.wait()).token_ids) == 6
        assert len((await a.wait()).token_ids) == 6
    assert "pull_done" in [event.name for event in b.last.timeline]
    assert "pull_failed" in [event.name for event in a.last.timeline]
    await prefill.settled()
    await decode.settled()


async def test_a_prompt_whose_puller_is_slow_to_come_is_kept_while_nobody_waits_for_its_pages(
    start_worker: StartWorker, open_session: OpenSession
) -> None:
    prefill = await start_worker(Role.PREFILL, **NARROW)
    at_prefill = await open_session(prefill)
    held = await at_prefill.submit("a", PROMPT_A, purpose=PREFILL_ONLY)
    await held.began.wait()
    await at_prefill.submit("b", PROMPT_B, purpose=PREFILL_ONLY)  # whom nobody pulls either
    await wait_until(lambda: prefill.worker.state.load().num_waiting == 1)
    assert prefill.worker.state.ring(prefill.worker.exports.is_pulled) is None
