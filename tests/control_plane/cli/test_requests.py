"""`penstock top` and `penstock migrate`, against gateways and a directory that say what a test wants."""

import http.server
import json
import os
import pty
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from control_plane.cli.__main__ import app
from control_plane.config import PROJECT_ROOT
from control_plane.runtimes.state import GatewayState, RunState, own_process_id
from protos import directory_pb2, directory_pb2_grpc, worker_pb2

ON_TERMINAL = str(Path(__file__).with_name("on_terminal.py"))
MOVED = {
    "request_id": "cmpl-1-0", "source": "decode-0", "target": "decode-1", "reason": "operator", "outcome": "moved",
    "detail": "", "num_tokens": 300, "duration_s": 0.0214, "handed_over_s": 0.015, "gap_s": 0.0061, "ended_unix_s": 2.0,
}  # fmt: skip
REFUSED = {
    **MOVED, "request_id": "cmpl-0-0", "reason": "drain", "outcome": "target_lost", "detail": "UNAVAILABLE: gone",
    "gap_s": None, "ended_unix_s": 1.0,
}  # fmt: skip


def running(
    request_id: str, *, worker: str | None = "decode-0", age_s: float = 1.0, **fields: object
) -> dict[str, Any]:
    return {
        "request_id": request_id, "worker": worker, "pool": "decode", "num_prompt_tokens": 100, "num_output_tokens": 7,
        "priority": 0, "age_s": age_s, "moving_to": None, **fields,
    }  # fmt: skip


class FakeGateway(http.server.ThreadingHTTPServer):
    """Lists what it is told to, and answers every move with `reply`."""

    daemon_threads = True

    def __init__(self, *requests: dict[str, Any], moves: list[dict[str, Any]] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = list(requests)
        self.moves = moves or []
        self.reply: tuple[int, dict[str, Any]] = (200, MOVED)
        self.asked: list[tuple[str, dict[str, Any]]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: FakeGateway

    def do_GET(self) -> None:
        self.say(200, {"requests": self.server.requests, "recent_moves": self.server.moves})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        self.say(*self.server.reply)

    def say(self, status: int, body: dict[str, Any]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


class FakeDirectory(directory_pb2_grpc.DirectoryServicer):
    def Watch(self, request: directory_pb2.WatchRequest, context: Any) -> Iterator[directory_pb2.WatchEvent]:
        for worker_id, role, is_draining, num_free in (
            ("decode-1", worker_pb2.ROLE_DECODE, True, 60),
            ("decode-0", worker_pb2.ROLE_DECODE, False, 90),
            ("store-0", worker_pb2.ROLE_STORE, False, 5),
            ("prefill-0", worker_pb2.ROLE_PREFILL, False, 100),
        ):
            load = worker_pb2.WorkerLoad(
                num_running=3, num_waiting=1, num_pages=100, num_free_pages=num_free, num_demanded_pages=8
            )
            worker = worker_pb2.WorkerDescription(
                worker_id=worker_id, role=role, is_draining=is_draining, load=load
            )
            yield directory_pb2.WatchEvent(kind=directory_pb2.WatchEvent.JOINED, worker=worker)
        yield directory_pb2.WatchEvent(kind=directory_pb2.WatchEvent.SYNCED)


Serve = Callable[..., None]


@pytest.fixture
def serve(run_dir: Path) -> Iterator[Serve]:
    """A cluster's state file, its directory and its gateways."""
    directory = grpc.server(futures.ThreadPoolExecutor(2))
    directory_pb2_grpc.add_DirectoryServicer_to_server(FakeDirectory(), directory)
    directory.add_insecure_port(f"unix:{run_dir}/directory.sock")
    directory.start()
    started: list[FakeGateway] = []

    def start(*gateways: FakeGateway | str) -> None:
        states = []
        address = f"unix:{run_dir}/directory.sock"
        for number, gateway in enumerate(gateways):
            url = gateway if isinstance(gateway, str) else f"http://127.0.0.1:{gateway.server_port}"
            states.append(
                GatewayState(
                    name=f"control-{number}", http_url=url, grpc_address="", directory_address=address
                )
            )  # fmt: skip
            if isinstance(gateway, FakeGateway):
                threading.Thread(target=gateway.serve_forever, daemon=True).start()
                started.append(gateway)
        state = RunState(
            launcher=own_process_id(), ready=True, gateways=tuple(states), model="fake", processes=()
        )
        state.write(run_dir)

    yield start
    for gateway in started:
        gateway.shutdown()
        gateway.server_close()
    directory.stop(None).wait()


def run(run_dir: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments, "--run-dir", str(run_dir)], env={"COLUMNS": "160"})


def migrate(run_dir: Path, *flags: str) -> Any:
    return run(run_dir, "migrate", "cmpl-1-0", "--to", "decode-1", *flags)


# penstock migrate


def test_says_how_long_it_took(run_dir: Path, serve: Serve) -> None:
    gateway = FakeGateway()
    serve(gateway)
    result = migrate(run_dir)
    assert result.exit_code == 0
    assert result.stdout == (
        "cmpl-1-0: decode-0 -> decode-1: moved in 21 ms at 300 tokens, "
        "6 ms between its last token there and its first here\n"
    )
    assert gateway.asked == [("/admin/requests/cmpl-1-0/move", {"worker": "decode-1"})]
    assert json.loads(migrate(run_dir, "--json").stdout) == MOVED


def test_a_request_that_has_not_moved_is_a_failure(run_dir: Path, serve: Serve) -> None:
    gateway = FakeGateway()
    gateway.reply = (200, REFUSED)
    serve(gateway)
    result = migrate(run_dir)
    assert result.exit_code == 1
    assert result.stdout == "cmpl-0-0: decode-0 -> decode-1: target lost after 21 ms: UNAVAILABLE: gone\n"


def test_the_gateway_that_has_the_request_is_found(run_dir: Path, serve: Serve) -> None:
    without, having = FakeGateway(), FakeGateway()
    without.reply = (404, {"error": {"message": "no request", "code": "request_not_found"}})
    serve("http://127.0.0.1:9", without, having)
    assert migrate(run_dir).exit_code == 0
    assert (len(without.asked), len(having.asked)) == (1, 1)


def test_what_the_gateway_refuses_is_said(run_dir: Path, serve: Serve) -> None:
    gateway = FakeGateway()
    gateway.reply = (409, {"error": {"message": "decode-1 is draining", "code": "cannot_move"}})
    serve(gateway)
    result = migrate(run_dir)
    assert (result.exit_code, result.stderr) == (1, "penstock: decode-1 is draining\n")


def test_a_request_that_nobody_has_is_a_failure(run_dir: Path, serve: Serve) -> None:
    gateway = FakeGateway()
    gateway.reply = (404, {"error": {"message": "no request", "code": "request_not_found"}})
    serve(gateway)
    result = migrate(run_dir)
    assert result.exit_code == 1
    assert result.stderr == "penstock: no request 'cmpl-1-0' runs here; penstock top lists those that do\n"


# penstock top


def rows(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines()]


def test_one_picture_has_pools_workers_requests_and_moves(run_dir: Path, serve: Serve) -> None:
    first = FakeGateway(running("young", age_s=0.5, priority=-1), moves=[MOVED])
    second = FakeGateway(
        running("old", age_s=12.25, moving_to="decode-1"),
        running("new", worker=None, age_s=0),
        moves=[REFUSED],
    )
    serve(first, second)
    result = run(run_dir, "top", "--once")
    assert result.exit_code == 0
    assert rows(result.stdout) == [
        ["fake:", "3", "requests"],
        [],
        ["pool", "worker", "running", "waiting", "pages", "used", "demanded", "leases"],
        ["prefill", "1", "worker", "3", "1", "0/100", "8", "0"],
        ["prefill-0", "3", "1", "0/100", "8", "0"],
        ["decode", "2", "workers", "6", "2", "50/200", "16", "0"],
        ["decode-0", "3", "1", "10/100", "8", "0"],
        ["decode-1", "3", "1", "40/100", "8", "0", "draining"],
        ["store", "1", "worker", "3", "1", "-", "8", "0"],
        ["store-0", "3", "1", "-", "8", "0"],
        [],
        ["request", "worker", "prompt", "output", "priority", "age"],
        ["old", "decode-0", "->", "decode-1", "100", "7", "0", "12.2", "s"],
        ["young", "decode-0", "100", "7", "-1", "0.5", "s"],
        ["new", "none", "yet", "100", "7", "0", "0.0", "s"],
        [],
        ["moves"],
        *rows(
            "cmpl-1-0: decode-0 -> decode-1: moved in 21 ms at 300 tokens, "
            "6 ms between its last token there and its first here (operator)\n"
            "cmpl-0-0: decode-0 -> decode-1: target lost after 21 ms: UNAVAILABLE: gone (drain)"
        ),
    ]  # fmt: skip


def test_an_idle_cluster_has_no_requests_and_no_moves(run_dir: Path, serve: Serve) -> None:
    serve(FakeGateway())
    output = run(run_dir, "top").stdout  # without a terminal it ends by itself
    assert output.startswith("fake: 0 requests\n")
    assert "moves" not in output
    assert "prompt" not in output


def test_a_gateway_that_does_not_answer_is_named(run_dir: Path, serve: Serve) -> None:
    serve("http://127.0.0.1:9", FakeGateway(running("r")))
    output = run(run_dir, "top", "--once").stdout
    assert "control-0 does not answer: [Errno 111] Connection refused" in output
    assert "decode-0" in output


def test_on_a_terminal_it_goes_on_until_ctrl_c(run_dir: Path, serve: Serve) -> None:
    gateway = FakeGateway(*(running(f"r{number}") for number in range(100)))
    serve(gateway)
    reading, its_end = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "control_plane.cli",
        "top",
        "--run-dir",
        str(run_dir),
        "--interval",
        "0.1",
    ]
    process = subprocess.Popen(
        [sys.executable, ON_TERMINAL, *command], stdin=its_end, stdout=its_end, stderr=its_end, cwd=PROJECT_ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "30"}, start_new_session=True,
    )  # fmt: skip
    os.close(its_end)
    try:
        output = b""
        while b"younger" not in output:
            assert select.select([reading], [], [], 30)[0], output
            output += os.read(reading, 65536)
        gateway.requests = [running("later")]
        while b"later" not in output:
            assert select.select([reading], [], [], 30)[0], output
            output += os.read(reading, 65536)
        # 30 lines, of which 10 are the workers' and 3 the table's own.
        assert b"and 83 younger ones" in output
        os.write(reading, b"\x03")
        # Its terminal must be read for it to end.
        while select.select([reading], [], [], 30)[0]:
            try:
                if not os.read(reading, 65536):
                    break
            except OSError:
                break
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reading)


def test_where_nothing_runs_both_say_so(run_dir: Path) -> None:
    for arguments in (["top", "--once"], ["migrate", "r", "--to", "w"]):
        result = run(run_dir, *arguments)
        assert result.exit_code == 1
        assert (
            result.stderr
            == f"penstock: nothing runs in {run_dir}; penstock up starts one, --run-dir names another\n"
        )
