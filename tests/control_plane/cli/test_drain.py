"""`penstock drain`, against a directory and a worker that do what a test wants."""

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from control_plane.cli.__main__ import app
from control_plane.runtimes import service
from control_plane.runtimes.state import GatewayState, ProcessState, RunState, Status, own_process_id
from protos import directory_pb2, directory_pb2_grpc, worker_pb2, worker_pb2_grpc

WORKER = "decode-0"
HAS = worker_pb2.DrainReply(num_requests=2, num_leases=1)
NOTHING = worker_pb2.DrainReply()
SOMETHING = worker_pb2.DrainReply(num_requests=1, num_blocks=40, num_pages=7, request_ids=["cmpl-1-0#d4cf-1"])


@dataclass
class FakeWorker(worker_pb2_grpc.WorkerServicer, directory_pb2_grpc.DirectoryServicer):
    """The only member of its directory. It stops once it has said each of `loads`, and leaves `left`."""

    address: str = ""
    loads: list[worker_pb2.WorkerLoad] = field(default_factory=list)
    left: worker_pb2.DrainReply | None = field(default_factory=worker_pb2.DrainReply)
    refuses: bool = False
    is_gone_at_once: bool = False
    is_member: bool = True
    when_asked: Callable[[], None] = lambda: None
    stopped: threading.Event = field(default_factory=threading.Event)
    asked: list[worker_pb2.DrainRequest] = field(default_factory=list)

    def Watch(self, request: directory_pb2.WatchRequest, context: Any) -> Iterator[directory_pb2.WatchEvent]:
        if self.is_member:
            yield directory_pb2.WatchEvent(kind=directory_pb2.WatchEvent.JOINED, worker=self._describe())
        yield directory_pb2.WatchEvent(kind=directory_pb2.WatchEvent.SYNCED)

    def Describe(self, request: worker_pb2.DescribeRequest, context: Any) -> worker_pb2.WorkerDescription:
        if not self.loads:
            self.stopped.set()
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        return self._describe(self.loads.pop(0))

    def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainReply:
        self.asked.append(request)
        if self.refuses:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not now")
        self.when_asked()
        if not request.until_stopped:
            if self.is_gone_at_once:
                self.stopped.set()
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            return HAS
        self.stopped.wait()
        if self.left is None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "crashed")
        assert self.left is not None
        return self.left

    def _describe(self, load: worker_pb2.WorkerLoad | None = None) -> worker_pb2.WorkerDescription:
        return worker_pb2.WorkerDescription(
            worker_id=WORKER, epoch=7, control_address=self.address, load=load, role=worker_pb2.ROLE_DECODE
        )


Serve = Callable[..., FakeWorker]


@pytest.fixture
def serve(run_dir: Path) -> Iterator[Serve]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    started: list[FakeWorker] = []

    def start(*, status: Status = Status.READY, detail: str = "", **behaviour: Any) -> FakeWorker:
        worker = FakeWorker(address=f"unix:{run_dir}/worker.sock", **behaviour)
        worker_pb2_grpc.add_WorkerServicer_to_server(worker, server)
        directory_pb2_grpc.add_DirectoryServicer_to_server(worker, server)
        server.add_insecure_port(worker.address)
        server.start()
        gateway = GatewayState(
            name="control", http_url="http://127.0.0.1:9", grpc_address="", directory_address=worker.address
        )
        process = ProcessState(name=WORKER, pool="decode", status=status, detail=detail)
        RunState(
            launcher=own_process_id(), ready=True, gateways=(gateway,), model="fake", processes=(process,)
        ).write(run_dir)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.stopped.set()
    server.stop(None).wait()


def drain(run_dir: Path, *flags: str) -> Any:
    return CliRunner().invoke(app, ["drain", WORKER, *flags, "--run-dir", str(run_dir)])


def load(**counts: int) -> worker_pb2.WorkerLoad:
    return worker_pb2.WorkerLoad(**counts)


def test_says_what_the_worker_waits_for_until_it_has_gone(run_dir: Path, serve: Serve) -> None:
    worker = serve(loads=[load(num_running=1, num_waiting=1, num_leases=1), load(num_leases=1), load()])
    result = drain(run_dir, "--timeout", "60")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "decode-0 takes no new requests; it has 2 requests, 1 lease",
        "decode-0 waits for 2 requests, 1 lease",
        "decode-0 waits for 1 lease",
        "decode-0 waits for blocks on their way to memory and stores",
        "decode-0 has gone; penstock resume decode-0 starts it again",
    ]
    assert [request.timeout_s for request in worker.asked] == [
        60.0,
        60.0,
    ]  # no shorter deadline than asked for
    assert service.is_out(run_dir, WORKER)


def test_a_worker_that_is_resumed_while_it_drains_is_not_said_to_stay_away(
    run_dir: Path, serve: Serve
) -> None:
    serve(when_asked=lambda: service.put_back(run_dir, WORKER))
    assert drain(run_dir).stdout.splitlines()[-1] == "decode-0 has gone"


def test_a_worker_that_is_taken_out_while_it_drains_to_restart_is_said_to_stay_away(
    run_dir: Path, serve: Serve
) -> None:
    serve(when_asked=lambda: service.take_out(run_dir, WORKER))
    last_line = drain(run_dir, "--restart").stdout.splitlines()[-1]
    assert last_line == "decode-0 has gone; penstock resume decode-0 starts it again"


def test_what_was_left_at_the_deadline_is_listed_and_no_success(run_dir: Path, serve: Serve) -> None:
    serve(left=SOMETHING)
    result = drain(run_dir, "--restart")
    assert result.exit_code == 3
    assert result.stderr == "penstock: decode-0 has gone and left 1 request, 40 blocks (cmpl-1-0)\n"
    assert not service.is_out(run_dir, WORKER)


def test_a_worker_that_ends_without_a_word_is_a_failure(run_dir: Path, serve: Serve) -> None:
    serve(left=None)
    result = drain(run_dir)
    assert result.exit_code == 1
    assert "decode-0 has gone without a word of what it left" in result.stderr


def test_a_worker_that_is_gone_before_it_can_say_what_it_has_has_drained(run_dir: Path, serve: Serve) -> None:
    serve(is_gone_at_once=True)
    result = drain(run_dir)
    assert (result.exit_code, result.stdout) == (
        0,
        "decode-0 has gone; penstock resume decode-0 starts it again\n",
    )


def test_a_worker_that_is_drained_is_named_as_such(run_dir: Path, serve: Serve) -> None:
    worker = serve(status=Status.DRAINED, is_member=False)
    result = drain(run_dir)
    assert result.exit_code == 0
    assert result.stdout == "decode-0 is drained; penstock resume decode-0 starts it again\n"
    restarted = drain(run_dir, "--restart")
    assert restarted.exit_code == 1
    assert "penstock resume decode-0" in restarted.stderr
    assert not worker.asked


def test_a_worker_that_is_not_in_the_directory_cannot_be_asked(run_dir: Path, serve: Serve) -> None:
    serve(status=Status.RESTARTING, is_member=False)
    result = drain(run_dir)
    assert result.exit_code == 1
    assert "decode-0 is restarting and not in the directory" in result.stderr


def test_a_worker_that_nobody_knows_is_a_failure(run_dir: Path, serve: Serve) -> None:
    serve()
    result = CliRunner().invoke(app, ["drain", "decode-9", "--run-dir", str(run_dir)])
    assert result.exit_code == 1
    assert result.stderr == "penstock: there is no worker 'decode-9'; known here: decode-0\n"


def test_only_a_worker_that_is_known_and_out_of_service_is_resumed(run_dir: Path, serve: Serve) -> None:
    serve()
    unknown = CliRunner().invoke(app, ["resume", "decode-9", "--run-dir", str(run_dir)])
    assert unknown.exit_code == 1
    assert unknown.stderr == "penstock: there is no worker 'decode-9'; known here: decode-0\n"
    serving = CliRunner().invoke(app, ["resume", "decode-0", "--run-dir", str(run_dir)])
    assert serving.exit_code == 1
    assert serving.stderr == "penstock: 'decode-0' is not out of service\n"


def test_status_shows_how_to_resume_in_a_line_of_its_own_however_narrow_the_terminal(
    run_dir: Path, serve: Serve
) -> None:
    hint = f"penstock resume {WORKER} starts it again"
    serve(status=Status.DRAINED, detail=hint)
    result = CliRunner().invoke(app, ["status", "--run-dir", str(run_dir)], env={"COLUMNS": "40"})
    assert result.stdout.splitlines()[-1] == f"{WORKER}: {hint}"


def test_a_worker_that_does_not_drain_stays_in_service(run_dir: Path, serve: Serve) -> None:
    serve(refuses=True)
    result = drain(run_dir)
    assert result.exit_code == 1
    assert result.stderr == "penstock: decode-0 does not drain: invalid_argument: not now\n"
    assert not service.is_out(run_dir, WORKER)


def test_a_drain_that_is_refused_does_not_undo_the_one_before(run_dir: Path, serve: Serve) -> None:
    serve(refuses=True)
    service.take_out(run_dir, WORKER)
    assert drain(run_dir).exit_code == 1
    assert service.is_out(run_dir, WORKER)
