import asyncio

import pytest

from control_plane.gateway import wire
from control_plane.gateway.sessions import (
    SessionClosed,
    SessionLost,
    SessionPool,
    SessionSettings,
    WorkerSession,
)
from control_plane.gateway.wire import Assignment, FailureCode, Outcome, WorkerOutput
from protos import worker_pb2
from tests.control_plane.fake_cluster import Cluster, make_generation
from tests.control_plane.fake_worker import WAIT_S, FakeWorker


class Sink:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[WorkerOutput | SessionLost] = []
        self._changed = asyncio.Condition()
        self._event = asyncio.Event()

    def __call__(self, item: WorkerOutput | SessionLost) -> None:
        self.heard.append(item)
        self._event.set()

    async def until(self, num_items: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.heard) < num_items:
                self._event.clear()
                await self._event.wait()


def submit(session: WorkerSession, request_id: str = "r", *, max_tokens: int = 3) -> Sink:
    sink = Sink()
    assignment = Assignment(
        request_id=request_id, generation=make_generation(max_tokens=max_tokens), arrival_unix_s=1.0
    )
    session.submit(wire.write_generate(assignment, kv_source=None), sink=sink)
    return sink


def session_with(cluster: Cluster, worker: FakeWorker) -> WorkerSession:
    session = cluster.sessions.get(worker.member.incarnation)
    assert session is not None
    return session


async def test_hello_names_the_gateway_the_epoch_and_the_model(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("w", epoch=7))
    (hello,) = worker.hellos
    assert (hello.gateway_id, hello.worker_epoch) == ("gateway-under-test", 7)
    assert hello.model_fingerprint == worker.description.model.fingerprint


async def test_outputs_reach_the_sink_of_their_request_and_no_other(cluster: Cluster) -> None:
    session = session_with(cluster, await cluster.start(FakeWorker("w")))
    sinks = [submit(session, f"r{number}") for number in range(20)]
    for sink in sinks:
        await sink.until(3)
        assert [output.first_token_number for output in sink.heard] == [0, 1, 2]
    assert session.num_requests == 0


async def test_all_of_a_step_is_read_field_by_field(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("w", max_answer_tokens=0))
    sink = submit(session_with(cluster, worker))
    await worker.until(lambda: len(worker.submits) == 1)
    top = worker_pb2.TokenLogprobs(logprob=-0.5, top_token_ids=[4, 5], top_logprobs=[-0.5, -1.5])
    worker.output(
        "r",
        [4],
        first=0,
        logprobs=[top],
        num_cached_tokens=16,
        finish_reason=worker_pb2.FINISH_STOP,
        stop_string="end",
    )
    await sink.until(1)
    (output,) = sink.heard
    assert isinstance(output, WorkerOutput)
    assert (output.token_ids, output.num_cached_tokens) == ((4,), 16)
    assert (output.outcome, output.stop_string) == (Outcome.STOP, "end")
    assert output.logprobs[0].top == ((4, -0.5), (5, -1.5))


async def test_an_end_that_nobody_knows_is_a_failure(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("w", max_answer_tokens=0))
    sink = submit(session_with(cluster, worker))
    await worker.until(lambda: len(worker.submits) == 1)
    worker.output("r", [], first=0, finish_reason=99)
    await sink.until(1)
    (output,) = sink.heard
    assert isinstance(output, WorkerOutput)
    assert output.failure is not None
    assert output.failure.code is FailureCode.INTERNAL


async def test_what_the_generation_asks_arrives_at_the_worker(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("w", max_answer_tokens=0))
    source = await cluster.start(FakeWorker("p", epoch=5, role=worker_pb2.ROLE_PREFILL))
    generation = make_generation(
        max_tokens=9, priority=-2, cache_salt="tenant", tenant="gold", tenant_weight=3.0, deadline_unix_s=99.5
    )
    assignment = Assignment(
        request_id="r", generation=generation, output_token_ids=(5, 6), arrival_unix_s=12.5
    )
    message = wire.write_generate(assignment, kv_source=source.member)
    session_with(cluster, worker).submit(message, sink=Sink())
    await worker.until(lambda: len(worker.submits) == 1)
    (got,) = worker.submits
    assert list(got.prompt_token_ids) == generation.prompt_token_ids
    assert (list(got.output_token_ids), got.priority, got.cache_salt) == ([5, 6], -2, "tenant")
    assert (got.sampling.max_tokens, got.sampling.seed, got.arrival_unix_s) == (9, 1, 12.5)
    assert (got.tenant, got.tenant_weight, got.deadline_unix_s) == ("gold", 3.0, 99.5)
    assert not got.sampling.HasField("num_logprobs")
    assert (got.kv_source.worker_id, got.kv_source.epoch, got.kv_source.request_id) == ("p", 5, "r")
    assert got.kv_source.control_address == source.description.control_address


async def test_an_aborted_request_is_not_heard_of_again(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("w", max_answer_tokens=0))
    session = session_with(cluster, worker)
    aborted, other = submit(session, "aborted"), submit(session, "other")
    session.abort("aborted")
    session.abort("aborted")
    await worker.until(lambda: len(worker.aborts) == 1)
    worker.output("aborted", [1], first=0)
    worker.output("other", [1], first=0)
    await other.until(1)
    assert aborted.heard == []
    assert worker.aborts == ["aborted"]
    assert session.num_requests == 1


async def test_a_broken_session_fails_its_requests_and_is_opened_again(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("w", max_answer_tokens=0))
    session = session_with(cluster, worker)
    sinks = [submit(session, f"r{number}") for number in range(3)]
    await worker.until(lambda: len(worker.submits) == 3)
    worker.break_sessions()
    for sink in sinks:
        await sink.until(1)
        assert isinstance(sink.heard[0], SessionLost)
    await cluster.until(lambda: session.is_ready)
    assert session.num_requests == 0
    assert len(worker.hellos) == 2


async def test_a_killed_worker_fails_its_requests_and_one_started_again_is_used(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("w", max_answer_tokens=0))
    sink = submit(session_with(cluster, worker))
    await worker.until(lambda: len(worker.submits) == 1)
    await worker.stop()
    await sink.until(1)
    assert isinstance(sink.heard[0], SessionLost)
    again = FakeWorker("w", epoch=2)
    again.description.control_address = worker.description.control_address
    await cluster.start(again)
    assert cluster.sessions.get(worker.member.incarnation) is None
    sink = submit(session_with(cluster, again))
    await sink.until(3)


async def test_a_worker_that_leaves_the_directory_fails_its_requests_without_a_word_from_it(
    cluster: Cluster,
) -> None:
    worker = await cluster.start(FakeWorker("frozen", max_answer_tokens=0))
    sink = submit(session_with(cluster, worker))
    cluster.leave(worker)
    assert [type(item) for item in sink.heard] == [SessionLost]  # at once, not after a turn of the loop
    assert cluster.sessions.sessions() == ()


async def test_garbage_breaks_the_session(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("w", max_answer_tokens=0))
    sink = submit(session_with(cluster, worker))
    await worker.until(lambda: len(worker.submits) == 1)
    worker.send(b"\xff\xff\xff\xff no protobuf")
    await sink.until(1)
    assert isinstance(sink.heard[0], SessionLost)


async def test_a_session_is_not_ready_before_the_welcome(cluster: Cluster) -> None:
    worker = FakeWorker("slow")
    worker.welcomes.clear()
    await worker.start()
    cluster.workers.append(worker)
    cluster.join(worker)
    await worker.until(lambda: len(worker.hellos) == 1)
    session = session_with(cluster, worker)
    assert not session.is_ready
    with pytest.raises(SessionClosed, match="slow"):
        submit(session)
    worker.welcomes.set()
    await cluster.until(lambda: session.is_ready)


async def test_hello_is_tried_again_when_the_worker_does_not_answer_it() -> None:
    worker = FakeWorker("slow")
    worker.welcomes.clear()
    await worker.start()
    sessions = SessionPool(SessionSettings(gateway_id="g", hello_timeout_s=0.05))
    session = WorkerSession(
        worker.member,
        settings=SessionSettings(gateway_id="g", hello_timeout_s=0.05),
        on_change=lambda: None,
        on_lost=lambda member: None,
    )
    await worker.until(lambda: len(worker.hellos) == 2)
    assert not session.is_ready
    session.close("the test is over")
    await asyncio.wait([session.task])
    await sessions.close()
    await worker.stop()


@pytest.mark.parametrize("field", ["worker_id", "epoch", "fingerprint"])
async def test_a_stranger_at_the_worker_s_address_gets_no_requests(cluster: Cluster, field: str) -> None:
    worker = FakeWorker("w")
    match field:
        case "worker_id":
            worker.welcome.worker_id = "stranger"
        case "epoch":
            worker.welcome.epoch = 99
        case _:
            worker.welcome.model.fingerprint = b"other"
    await worker.start()
    cluster.workers.append(worker)
    cluster.join(worker)
    await worker.until(lambda: len(worker.hellos) == 2)
    assert not session_with(cluster, worker).is_ready


async def test_a_worker_that_takes_no_messages_loses_its_session() -> None:
    worker = FakeWorker("stuck", max_answer_tokens=0)
    await worker.start()
    session = WorkerSession(
        worker.member,
        settings=SessionSettings(gateway_id="g", max_queued_messages=4),
        on_change=(ready := asyncio.Event()).set,
        on_lost=lambda member: None,
    )
    await ready.wait()
    sinks = [submit(session, f"r{number}") for number in range(4)]  # no turn of the loop: none is sent
    with pytest.raises(SessionClosed):
        submit(session, "one too many")
    assert all(isinstance(sink.heard[0], SessionLost) for sink in sinks)
    assert session.num_requests == 0
    await worker.until(lambda: len(worker.hellos) == 2)
    session.close("the test is over")
    await asyncio.wait([session.task])
    await worker.stop()


async def test_a_report_takes_the_place_of_what_was_counted_since_the_last(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("w", max_answer_tokens=0))
    session = session_with(cluster, worker)
    submit(session)
    session.note_pick(3, num_tokens=40, num_pages=3)
    session.note_pick(4, num_tokens=2, num_pages=1)
    view = session.view()
    assert (view.num_assigned, view.last_pick) == (1, 4)
    assert (view.num_unreported_tokens, view.num_unreported_pages) == (42, 4)
    cluster.directory.heartbeat(worker.member.incarnation, load=worker.member.load, blocks=None, now_s=0.0)
    assert (session.view().num_assigned, session.view().num_unreported_tokens) == (1, 0)


async def test_after_the_end_nobody_who_joins_gets_a_session(cluster: Cluster) -> None:
    worker = await cluster.start(FakeWorker("w"))
    await cluster.sessions.close()
    cluster.leave(worker)
    cluster.join(worker)
    assert cluster.sessions.sessions() == ()
    assert worker.hellos == worker.hellos[:1]
