import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from control_plane.directory.memory import ChangeKind, MemoryDirectory
from control_plane.directory.overlap import NO_OVERLAP
from control_plane.directory.server import SERVER_OPTIONS, DirectoryServicer
from kvstore.blocks import BlockKey, chain_keys, root_key
from kvstore.holdings import Holdings
from kvstore.tiers.tier import Tier
from protos import directory_pb2_grpc, worker_pb2
from workers import membership
from workers.config import Role
from workers.membership import BlockReport
from workers.request import Request, RequestId, SamplingParams, SessionId
from workers.scheduler import SchedulerLimits, schedule
from workers.state import EngineState, StateLimits
from workers.step import SampledToken, StepResult

Fixture = Any
FINGERPRINT = b"f" * 32
PROMPT = list(range(3, 83))  # five blocks


class Directory:
    """A real directory on one port that may go away and come back."""

    def __init__(self) -> None:
        self.memory = MemoryDirectory(ttl_s=2.0)
        self.address = "127.0.0.1:0"
        self._server: grpc.aio.Server | None = None
        self._changed = asyncio.Event()

    async def start(self) -> None:
        self.memory = MemoryDirectory(ttl_s=2.0)
        self.memory.subscribe(lambda _: self._changed.set())
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        servicer = DirectoryServicer(self.memory, heartbeat_s=0.02)
        directory_pb2_grpc.add_DirectoryServicer_to_server(servicer, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(self.address)}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
async def directory() -> AsyncIterator[Directory]:
    made = Directory()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def hanging_directory(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Directory]:
    """Takes in a worker and hears its heartbeats, but to news it never answers, and nobody gives it up."""
    register = DirectoryServicer.Register

    async def hanging(self: DirectoryServicer, request: Any, context: Any) -> Any:
        if request.worker.is_draining:
            await asyncio.Event().wait()
        return await register(self, request, context)

    monkeypatch.setattr(DirectoryServicer, "Register", hanging)
    monkeypatch.setattr(membership, "RPC_TIMEOUT_S", 3600.0)
    made = Directory()
    await made.start()
    yield made
    await made.stop()


async def test_a_worker_registers_and_reports_its_load_and_its_blocks(
    directory: Directory, start_worker: Fixture, open_session: Fixture
) -> None:
    running = await start_worker(Role.DECODE, directory=directory.address)
    await directory.until(lambda: len(directory.memory.members()) == 1)
    (member,) = directory.memory.members()
    assert member.epoch == running.identity.epoch
    assert member.control_address == running.identity.control_address
    session = await open_session(running)
    await (await session.submit("r", PROMPT, max_tokens=2, ignore_eos=True)).wait()
    keys = list(chain_keys(root_key(model_fingerprint=running.identity.fingerprint), PROMPT))
    await directory.until(
        lambda: directory.memory.blocks.overlaps(keys).get(member.worker_id, NO_OVERLAP).num_blocks == 5
    )


async def test_a_worker_that_stops_says_goodbye(directory: Directory, start_worker: Fixture) -> None:
    running = await start_worker(directory=directory.address)
    await directory.until(lambda: len(directory.memory.members()) == 1)
    await running.end()
    assert directory.memory.members() == ()


async def test_a_worker_that_drains_says_so_and_goes_when_it_is_done(
    directory: Directory, start_worker: Fixture, open_session: Fixture
) -> None:
    running = await start_worker(Role.PREFILL, directory=directory.address)
    await directory.until(lambda: len(directory.memory.members()) == 1)
    session = await open_session(running)
    held = await session.submit("r", PROMPT, purpose=worker_pb2.Submit.PREFILL_ONLY)
    await held.began.wait()
    running.drain.begin()
    await directory.until(lambda: any(member.is_draining for member in directory.memory.members()))
    await session.abort("r")
    await running.task
    assert directory.memory.members() == ()


async def test_an_idle_worker_that_drains_says_so_before_it_says_goodbye(
    directory: Directory, start_worker: Fixture
) -> None:
    running = await start_worker(directory=directory.address)
    await directory.until(lambda: len(directory.memory.members()) == 1)
    heard: list[tuple[ChangeKind, bool]] = []
    directory.memory.subscribe(lambda change: heard.append((change.kind, change.member.is_draining)))
    running.drain.begin()
    await running.task
    assert (ChangeKind.UPDATED, True) in heard
    assert heard[-1] == (ChangeKind.LEFT, True)


async def test_an_idle_worker_whose_directory_is_away_goes_all_the_same(
    directory: Directory, start_worker: Fixture
) -> None:
    running = await start_worker(directory=directory.address)
    await directory.until(lambda: len(directory.memory.members()) == 1)
    await directory.stop()
    running.drain.begin()
    async with asyncio.timeout(10):
        await running.task


async def test_a_directory_that_never_answers_holds_a_drain_up_for_so_long_and_no_longer(
    hanging_directory: Directory, start_worker: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "ANNOUNCE_TIMEOUT_S", 0.05)
    running = await start_worker(directory=hanging_directory.address)
    await hanging_directory.until(lambda: len(hanging_directory.memory.members()) == 1)
    running.drain.begin(3600.0)
    async with asyncio.timeout(10):
        await running.task


async def test_the_deadline_of_a_drain_holds_for_its_announcement_too(
    hanging_directory: Directory, start_worker: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "ANNOUNCE_TIMEOUT_S", 3600.0)
    running = await start_worker(directory=hanging_directory.address)
    await hanging_directory.until(lambda: len(hanging_directory.memory.members()) == 1)
    running.drain.begin(0.0)
    async with asyncio.timeout(10):
        await running.task


async def test_where_the_directory_has_gone_first_nobody_waits_for_it(
    directory: Directory, start_worker: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "ANNOUNCE_TIMEOUT_S", 3600.0)
    running = await start_worker(directory=directory.address)
    await directory.until(lambda: len(directory.memory.members()) == 1)
    await directory.stop()
    running.drain.begin(3600.0)
    async with asyncio.timeout(10):
        await running.task


async def test_news_that_a_directory_does_not_take_are_told_again(
    start_worker: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "ANNOUNCE_TIMEOUT_S", 3600.0)
    register, refused = DirectoryServicer.Register, asyncio.Event()

    async def refusing_once(self: DirectoryServicer, request: Any, context: Any) -> Any:
        if request.worker.is_draining and not refused.is_set():
            refused.set()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return await register(self, request, context)

    monkeypatch.setattr(DirectoryServicer, "Register", refusing_once)
    directory = Directory()
    await directory.start()
    running = await start_worker(directory=directory.address)
    await directory.until(lambda: len(directory.memory.members()) == 1)
    running.drain.begin()
    async with asyncio.timeout(10):
        await running.task
    assert refused.is_set()
    await directory.stop()


async def test_a_directory_that_comes_back_empty_learns_everything_again(
    directory: Directory, start_worker: Fixture, open_session: Fixture
) -> None:
    running = await start_worker(directory=directory.address)
    session = await open_session(running)
    await (await session.submit("r1", PROMPT, max_tokens=2, ignore_eos=True)).wait()
    await directory.until(lambda: directory.memory.blocks.num_blocks == 5)
    await directory.stop()
    # Requests do not notice.
    assert (
        len((await (await session.submit("r2", [7] * 40, max_tokens=2, ignore_eos=True)).wait()).token_ids)
        == 2
    )
    await directory.start()
    await directory.until(lambda: directory.memory.blocks.num_blocks == 7)
    assert directory.memory.members()[0].epoch == running.identity.epoch


async def test_a_worker_starts_without_its_directory_and_joins_when_it_comes(
    directory: Directory, start_worker: Fixture
) -> None:
    await directory.stop()
    await start_worker(directory=directory.address)
    await directory.start()
    await directory.until(lambda: len(directory.memory.members()) == 1)


async def test_a_worker_that_the_directory_forgot_registers_again(
    directory: Directory, start_worker: Fixture
) -> None:
    await start_worker(directory=directory.address)
    await directory.until(lambda: len(directory.memory.members()) == 1)
    directory.memory.expire(now_s=1e12)
    assert directory.memory.members() == ()
    await directory.until(lambda: len(directory.memory.members()) == 1)


async def test_a_worker_whose_place_was_taken_says_so(
    directory: Directory, start_worker: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    await start_worker(directory=directory.address, worker_id="twin")
    await directory.until(lambda: len(directory.memory.members()) == 1)
    second = await start_worker(directory=directory.address, worker_id="twin")
    await directory.until(lambda: "directory_refused" in caplog.messages)
    [member] = directory.memory.members()
    assert member.epoch == second.identity.epoch


async def test_a_worker_fails_over_to_the_next_process_of_the_directory(
    directory: Directory, start_worker: Fixture
) -> None:
    other = Directory()
    await other.start()
    await start_worker(directory=f"{directory.address},{other.address}")
    await directory.until(lambda: len(directory.memory.members()) == 1)
    await directory.stop()
    await other.until(lambda: len(other.memory.members()) == 1)
    await other.stop()


# The report alone.


def _state(num_pages: int) -> EngineState:
    limits = StateLimits(
        num_pages=num_pages, max_model_len=512, vocab_size=260, eos_token_ids=frozenset(),
        model_fingerprint=FINGERPRINT, max_num_waiting=10,
    )  # fmt: skip
    return EngineState(limits)


def _compute(state: EngineState, name: str, prompt: list[int]) -> list[BlockKey]:
    """Runs a request of one token through the state; the keys of its blocks."""
    request = Request(
        request_id=RequestId(name), session_id=SessionId(1), prompt_token_ids=prompt, arrival_s=1.0,
        sampling=SamplingParams(max_tokens=1),
    )  # fmt: skip
    state.add(request, now_s=1.0)
    limits = SchedulerLimits(max_num_batched_tokens=512, max_num_seqs=4, max_num_pulls=1)
    plan = schedule(state.view(), limits)
    state.begin(plan, now_s=2.0)
    state.apply(plan, StepResult(sampled={request.request_id: SampledToken(5)}), now_s=2.0)
    return list(chain_keys(root_key(model_fingerprint=FINGERPRINT), prompt))


def _report(state: EngineState) -> BlockReport:
    return BlockReport(Holdings(), take_device_events=state.take_block_events)


def test_the_first_report_is_a_snapshot_and_the_next_ones_are_changes() -> None:
    state = _state(num_pages=100)
    report = _report(state)
    first = _compute(state, "r1", PROMPT)
    taken = report.take(max_keys=100)
    assert taken.snapshot
    assert list(taken.stored) == first
    second = _compute(state, "r2", [9] * 32)
    taken = report.take(max_keys=100)
    assert not taken.snapshot
    assert list(taken.stored) == second
    assert report.take(max_keys=100).stored == ()


def test_evicted_blocks_are_reported_as_removed() -> None:
    state = _state(num_pages=6)
    report = _report(state)
    first = _compute(state, "r1", PROMPT)
    report.take(max_keys=100)
    second = _compute(state, "r2", [9] * 80)
    taken = report.take(max_keys=100)
    assert list(taken.stored) == second
    assert set(taken.removed) <= set(first)
    assert len(taken.removed) == 4


def test_a_restart_sends_everything_again() -> None:
    state = _state(num_pages=100)
    report = _report(state)
    first = _compute(state, "r1", PROMPT)
    report.take(max_keys=100)
    second = _compute(state, "r2", [9] * 32)
    report.restart()
    taken = report.take(max_keys=100)
    assert taken.snapshot
    assert set(taken.stored) == {*first, *second}
    assert report.take(max_keys=100).stored == ()


def test_a_report_too_long_for_one_heartbeat_goes_on_with_the_next() -> None:
    state = _state(num_pages=100)
    report = _report(state)
    keys = _compute(state, "r1", PROMPT)
    portions = [report.take(max_keys=2) for _ in range(4)]
    assert [portion.snapshot for portion in portions] == [True, False, False, False]
    assert [key for portion in portions for key in portion.stored] == keys
    assert [len(portion.stored) for portion in portions] == [2, 2, 1, 0]


def test_blocks_evicted_before_they_were_reported_are_never_reported_as_held() -> None:
    state = _state(num_pages=6)
    report = _report(state)
    _compute(state, "r1", PROMPT)
    portions = [report.take(max_keys=1)]
    second = _compute(state, "r2", [9] * 80)
    portions += [report.take(max_keys=2) for _ in range(10)]
    held: set[BlockKey] = set()
    for portion in portions:
        held = (held | set(portion.stored)) - set(portion.removed)
    assert held == set(state.take_block_snapshot())
    assert set(second) <= held


def test_a_block_is_reported_with_the_fastest_tier_that_holds_it() -> None:
    state, holdings = _state(num_pages=6), Holdings()
    report = BlockReport(holdings, take_device_events=state.take_block_events)
    first = _compute(state, "r1", PROMPT)
    assert report.take(max_keys=100).tiers == (Tier.DEVICE,) * 5
    holdings.note(Tier.MEMORY, stored=first)
    assert report.take(max_keys=100).stored == ()  # nothing that makes a difference
    _compute(state, "r2", [9] * 80)
    taken = report.take(max_keys=100)
    tiers = dict(zip(taken.stored, taken.tiers, strict=True))
    assert [tier for key, tier in tiers.items() if key in first] == [Tier.MEMORY] * 4
    assert taken.removed == ()
