import http.server
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from control_plane.cli.__main__ import app
from control_plane.runtimes.stale import wait_gone
from control_plane.runtimes.state import GatewayState, RunState, own_process_id
from protos import directory_pb2, directory_pb2_grpc, worker_pb2

Launch = Callable[..., Any]


class FakeDirectory(directory_pb2_grpc.DirectoryServicer):
    """Holds a decode worker that is busy and a store, and nobody else."""

    def Watch(self, request: directory_pb2.WatchRequest, context: Any) -> Iterator[directory_pb2.WatchEvent]:
        load = worker_pb2.WorkerLoad(
            num_running=3, num_waiting=2, num_pages=100, num_free_pages=60, num_leases=1
        )
        worker = worker_pb2.WorkerDescription(worker_id="decode-0", role=worker_pb2.ROLE_DECODE, load=load)
        store_load = worker_pb2.WorkerLoad(num_pages=1024, num_free_pages=959)
        store = worker_pb2.WorkerDescription(worker_id="store-0", role=worker_pb2.ROLE_STORE, load=store_load)
        for member in (worker, store):
            yield directory_pb2.WatchEvent(kind=directory_pb2.WatchEvent.JOINED, worker=member)
        yield directory_pb2.WatchEvent(kind=directory_pb2.WatchEvent.SYNCED)


@pytest.fixture
def directory(run_dir: Path) -> Iterator[Callable[[], None]]:
    """Serves a directory where a cluster of `run_dir` is to have it."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    directory_pb2_grpc.add_DirectoryServicer_to_server(FakeDirectory(), server)

    def start() -> None:
        server.add_insecure_port(f"unix:{run_dir}/sockets/directory.sock")
        server.start()

    yield start
    server.stop(None).wait()


def status(run_dir: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["status", "--run-dir", str(run_dir), *arguments], env={"COLUMNS": "160"})


def test_shows_processes_with_their_load(
    launch: Launch, run_dir: Path, directory: Callable[[], None]
) -> None:
    cluster = launch()
    cluster.read_until("chunk.choices[0]")
    state = cluster.state()
    directory()
    result = status(run_dir)
    assert result.exit_code == 0
    first, _, _, *rows = result.stdout.splitlines()
    assert first == f"fake at {state.http_url}/v1 (gRPC {state.grpc_address}): ready"
    control, prefill, decode = (row.split() for row in rows)
    assert control == ["control", "ready", str(state.processes[0].process_id.pid), "any"]
    assert "not in the directory" in " ".join(prefill)
    assert decode[:2] == ["decode-0", "ready"]
    assert decode[4:] == ["3", "2", "40/100", "1"]


def test_a_store_has_no_pages(launch: Launch, run_dir: Path, directory: Callable[[], None]) -> None:
    cluster = launch("pools.store.replicas=1")
    cluster.read_until("chunk.choices[0]")
    cluster.state()
    directory()
    store = status(run_dir).stdout.splitlines()[-1].split()
    assert (store[0], store[4:]) == ("store-0", ["0", "0", "-", "0"])


def test_json_holds_the_same_for_programs(
    launch: Launch, run_dir: Path, directory: Callable[[], None]
) -> None:
    cluster = launch()
    cluster.read_until("chunk.choices[0]")
    directory()
    result = status(run_dir, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert [gateway["health"] for gateway in report["gateways"]] == ["ready"]
    assert report["gateways"][0]["http_url"] == cluster.state().http_url
    assert (report["model"], report["launcher_pid"]) == ("fake", cluster.pid)
    by_name = {process["name"]: process for process in report["processes"]}
    assert by_name["control"]["pool"] is None
    assert by_name["prefill-0"]["health"] == "not in the directory"
    assert by_name["decode-0"]["load"]["num_free_pages"] == 60


def test_every_gateway_is_shown_and_one_that_is_away_is_a_failure(launch: Launch, run_dir: Path) -> None:
    cluster = launch("gateway.replicas=2", "directory.redis_url=redis://nowhere")
    assert cluster.read_until("chunk.choices[0]").count("  gRPC  ") == 2
    state = cluster.state()
    result = status(run_dir)
    assert result.exit_code == 0
    assert [line.split()[2] for line in result.stdout.splitlines()[:2]] == [
        f"{gateway.http_url}/v1" for gateway in state.gateways
    ]
    second = next(process for process in state.processes if process.name == "control-1")
    second.process_id.send(signal.SIGKILL)
    assert wait_gone([second.process_id], timeout_s=10)
    result = status(run_dir)
    assert result.exit_code == 1
    assert "does not answer" in result.stdout.splitlines()[1]


def test_a_directory_that_is_away_costs_the_loads_only(launch: Launch, run_dir: Path) -> None:
    cluster = launch()
    cluster.read_until("chunk.choices[0]")
    report = json.loads(status(run_dir, "--json").stdout)
    assert {process["health"] for process in report["processes"]} == {"ready"}
    assert {process["load"] for process in report["processes"]} == {None}


def test_a_cluster_whose_launcher_was_killed_is_called_dead(launch: Launch, run_dir: Path) -> None:
    cluster = launch()
    cluster.read_until("chunk.choices[0]")
    cluster.state()
    os.kill(cluster.pid, signal.SIGKILL)
    assert wait_gone(list(cluster.process_ids), timeout_s=10)
    result = status(run_dir)
    assert result.exit_code == 1
    assert "dead: the launcher was killed; penstock down clears up" in result.stdout
    assert result.stdout.count(" dead ") == 3


@pytest.fixture
def gateway_without_redis() -> Iterator[str]:
    """Its URL."""

    class Gateway(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"" if self.path == "/ready" else b"penstock_directory_redis_up 0.0\n"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_gateway_that_does_not_reach_redis_serves_and_is_named(
    run_dir: Path, gateway_without_redis: str
) -> None:
    gateway = GatewayState(
        name="control",
        http_url=gateway_without_redis,
        grpc_address="",
        directory_address=f"unix:{run_dir}/none",
    )
    RunState(launcher=own_process_id(), ready=True, gateways=(gateway,), model="m", processes=()).write(
        run_dir
    )
    result = status(run_dir)
    assert result.exit_code == 0
    assert result.stderr.startswith("penstock: control does not reach Redis: it serves, but shares neither")
    assert result.stderr.count("\n") == 1


def test_where_nothing_runs_it_says_so(run_dir: Path) -> None:
    result = status(run_dir)
    assert result.exit_code == 1
    assert (
        result.stderr
        == f"penstock: nothing runs in {run_dir}; penstock up starts one, --run-dir names another\n"
    )
