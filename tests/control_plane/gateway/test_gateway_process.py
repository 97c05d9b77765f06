"""The control process as its launcher and its workers see it."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
import yaml

from bench.redis_server import RedisServer
from control_plane.config import PROJECT_ROOT, load_config
from control_plane.directory.memory import MemoryDirectory
from control_plane.gateway import control_process
from protos import directory_pb2, directory_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.control_plane.fake_worker import FakeWorker

TIMEOUT_S = 30.0
HEARTBEAT_S, TTL_S = 0.1, 1.5


def write_config(path: Path, model_path: Path, *, redis_url: str = "", **gateway: object) -> Path:
    config = {
        "model": {"path": str(model_path), "name": "fake"},
        "gateway": {"port": 0, "grpc_port": 0, "drain_timeout_s": 0.1, "worker_wait_s": 0.1, **gateway},
        "directory": {"heartbeat_s": HEARTBEAT_S, "ttl_s": TTL_S, "redis_url": redis_url},
        "run_dir": str(path),
    }
    file = path / "cluster.yaml"
    file.write_text(yaml.safe_dump(config), "utf-8")
    return file


async def spawn(config: Path, *, replica: int = 0) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", "control_plane.gateway", "--config", str(config), "--replica", str(replica),
        env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT)},
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


@dataclass
class Control:
    process: asyncio.subprocess.Process
    http: str
    grpc: str
    directory: str

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> list[str]:
        """Its last lines."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        _, stderr = await asyncio.wait_for(self.process.communicate(), TIMEOUT_S)
        return stderr.decode().splitlines()


async def start(config: Path, *, replica: int = 0) -> Control:
    process = await spawn(config, replica=replica)
    assert process.stderr is not None
    async with asyncio.timeout(TIMEOUT_S):
        async for line in process.stderr:
            event = json.loads(line)
            if event["event"] == "ready":
                return Control(process, event["http"], event["grpc"], event["directory"])
    raise AssertionError(f"the process ended with {await process.wait()} before it was ready")


@pytest.fixture
async def control(tmp_path: Path, model_path: Path) -> AsyncIterator[Control]:
    control = await start(write_config(tmp_path, model_path))
    yield control
    if control.process.returncode is None:
        control.process.kill()
        await control.process.communicate()


class JoinedWorker:
    """A fake worker that registers over gRPC and sends heartbeats until it is told to fall silent."""

    def __init__(self, control: Control, worker: FakeWorker) -> None:
        self.worker = worker
        self._channel = grpc.aio.insecure_channel(control.directory)
        self.stub: directory_pb2_grpc.DirectoryAsyncStub = directory_pb2_grpc.DirectoryStub(self._channel)

    async def __aenter__(self) -> "JoinedWorker":
        await self.worker.start()
        request = directory_pb2.RegisterRequest(worker=self.worker.description)
        reply = await self.stub.Register(request, timeout=TIMEOUT_S)
        self._heart = asyncio.create_task(self._beat(reply.heartbeat_s))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.fall_silent()
        await asyncio.wait([self._heart])
        await self.worker.stop()
        await self._channel.close()

    def fall_silent(self) -> None:
        self._heart.cancel()

    async def _beat(self, heartbeat_s: float) -> None:
        described = self.worker.description
        request = directory_pb2.HeartbeatRequest(
            worker_id=described.worker_id, epoch=described.epoch, load=described.load
        )
        with suppress(grpc.aio.AioRpcError):  # the process under test is gone
            while True:
                await self.stub.Heartbeat(request, timeout=TIMEOUT_S)
                await asyncio.sleep(heartbeat_s)


async def until_ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while (await http.get("/ready")).status_code != 200:  # noqa: ASYNC110
            await asyncio.sleep(0)


def body(**fields: object) -> dict[str, object]:
    return {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 5, **fields}


async def test_serves_http_and_grpc_once_a_worker_has_joined_and_stops_clean(
    control: Control, tmp_path: Path
) -> None:
    async with httpx.AsyncClient(base_url=control.http, timeout=TIMEOUT_S) as http:
        assert (await http.get("/ready")).status_code == 503
        assert (await http.post("/v1/completions", json=body())).status_code in (404, 503)
        async with JoinedWorker(control, FakeWorker("d")):
            await until_ready(http)
            answer = await http.post("/v1/completions", json=body())
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 5
            async with grpc.aio.insecure_channel(control.grpc) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                models = await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=TIMEOUT_S)
                assert [model.id for model in models.models] == ["fake"]
            metrics = (await http.get("/metrics")).text
            assert 'penstock_gateway_workers{role="decode"} 1.0' in metrics
            assert "penstock_gateway_generations_running 0.0" in metrics
    lines = await control.stop()
    assert control.process.returncode == 0
    assert json.loads(lines[-1])["event"] == "stopped"
    assert not [line for line in lines if json.loads(line).get("level") in ("warning", "error")]
    assert list((tmp_path / "sockets").iterdir()) == []


async def test_a_worker_that_falls_silent_leaves_and_its_requests_fail(control: Control) -> None:
    worker = FakeWorker("d", max_answer_tokens=1)
    async with (
        httpx.AsyncClient(base_url=control.http, timeout=TIMEOUT_S) as http,
        JoinedWorker(control, worker) as joined,
    ):
        await until_ready(http)
        request = asyncio.create_task(http.post("/v1/completions", json=body()))
        await worker.until(lambda: len(worker.submits) == 1)
        watch = joined.stub.Watch(directory_pb2.WatchRequest(), timeout=TIMEOUT_S)
        joined.fall_silent()
        async for event in watch:
            if event.kind == directory_pb2.WatchEvent.LEFT:
                break
        watch.cancel()
        assert (await request).status_code == 500
        assert (await http.get("/ready")).status_code == 503


async def test_two_of_them_share_their_workers_once_redis_is_there(tmp_path: Path, model_path: Path) -> None:
    redis = RedisServer(tmp_path)
    config = write_config(tmp_path, model_path, redis_url=redis.url, replicas=2)
    one, two = await asyncio.gather(start(config), start(config, replica=1))
    worker = FakeWorker("d")
    async with (
        httpx.AsyncClient(base_url=one.http, timeout=TIMEOUT_S) as http_one,
        httpx.AsyncClient(base_url=two.http, timeout=TIMEOUT_S) as http_two,
        JoinedWorker(one, worker),
    ):
        await until_ready(http_one)
        assert (await http_one.post("/v1/completions", json=body())).status_code == 200
        assert (await http_two.get("/ready")).status_code == 503
        assert "penstock_directory_redis_up 0.0" in (await http_two.get("/metrics")).text
        redis.start()
        await until_ready(http_two)
        assert (await http_two.post("/v1/completions", json=body())).status_code == 200
        assert "penstock_directory_redis_up 1.0" in (await http_two.get("/metrics")).text
        redis.kill()
        for http in (http_one, http_two):
            assert (await http.post("/v1/completions", json=body())).status_code == 200
    for control in (one, two):
        lines = [json.loads(line) for line in await control.stop()]
        assert control.process.returncode == 0
        events = [line["event"] for line in lines if line.get("level") == "warning"]
        assert 1 <= events.count("redis_away") <= 2
        assert not [line for line in lines if line.get("level") == "error"]
    assert len(worker.submits) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_even_while_a_request_hangs(control: Control, number: signal.Signals) -> None:
    worker = FakeWorker("d", max_answer_tokens=1)
    async with (
        httpx.AsyncClient(base_url=control.http, timeout=TIMEOUT_S) as http,
        JoinedWorker(control, worker),
    ):
        await until_ready(http)
        async with (
            http.stream("POST", "/v1/completions", json=body(stream=True)) as answer,
            aclosing(answer.aiter_lines()) as lines,
        ):
            await anext(lines)
            log = await control.stop(number)
        await worker.until(lambda: worker.num_running == 0)
    assert control.process.returncode == 0
    assert not [line for line in log if "Traceback" in line], log


@pytest.mark.parametrize("setting", ["port", "grpc_port"])
async def test_a_busy_port_is_named_in_one_line(tmp_path: Path, model_path: Path, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = await spawn(write_config(tmp_path, model_path, **{setting: port}))
        _, stderr = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode == 2
    (line,) = stderr.decode().splitlines()
    refusal = json.loads(line)
    assert refusal["event"] == "refused"
    assert refusal["detail"].startswith(f"gateway.{setting}: cannot listen on 127.0.0.1:{port}: ")


async def test_it_does_not_live_on_without_the_clock_of_its_directory(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(directory: MemoryDirectory) -> None:
        raise RuntimeError("a bug in the clock")

    monkeypatch.setattr(control_process, "expire_silent", crash)
    config = load_config(write_config(tmp_path, model_path))
    with pytest.raises(RuntimeError, match="a bug in the clock"):
        async with asyncio.timeout(TIMEOUT_S):
            await control_process.serve(
                config, replica=0, stop=asyncio.Event(), on_ready=lambda addresses: None
            )


async def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    process = await spawn(write_config(tmp_path, tmp_path))
    _, stderr = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode == 2
    assert "no tokenizer.json" in json.loads(stderr)["detail"]


async def test_a_redis_url_that_cannot_be_used_is_refused_without_being_shown(
    tmp_path: Path, model_path: Path
) -> None:
    process = await spawn(write_config(tmp_path, model_path, redis_url="redis://:secr/et@localhost:6379"))
    _, stderr = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode == 2
    (line,) = stderr.decode().splitlines()
    assert json.loads(line)["detail"].startswith("directory.redis_url cannot be used: ")
    assert "secr" not in line


async def test_a_setting_that_does_not_exist_is_refused(tmp_path: Path, model_path: Path) -> None:
    process = await spawn(write_config(tmp_path, model_path, prot=1))
    _, stderr = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode == 2
    assert b"prot" in stderr
