import asyncio
import functools
import math
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import worker_pb2, worker_pb2_grpc
from workers import server
from workers.errors import CannotListen
from workers.outbox import Outbox

Fixture = Any
PROMPT = list(range(10, 40))


async def test_hello_is_welcomed_with_what_the_worker_is(start_worker: Fixture, connect: Fixture) -> None:
    running = await start_worker()
    worker = await connect(running.identity).open()
    assert worker.worker_id == running.identity.worker_id
    assert worker.epoch == running.identity.epoch
    assert worker.model.fingerprint == running.engine.model.fingerprint
    assert worker.model.layout.num_layers == 2
    assert worker.load.num_pages == 64
    assert worker.pid == os.getpid()


async def test_describe_agrees_with_the_welcome(start_worker: Fixture, connect: Fixture) -> None:
    running = await start_worker()
    welcome = await connect(running.identity).open()
    async with grpc.aio.insecure_channel(running.identity.control_address) as channel:
        described = await worker_pb2_grpc.WorkerStub(channel).Describe(
            worker_pb2.DescribeRequest(), timeout=5.0
        )
    assert described == welcome


async def test_the_health_service_says_serving(start_worker: Fixture) -> None:
    running = await start_worker()
    async with grpc.aio.insecure_channel(running.identity.control_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5.0)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("setting", "host", "form"),
    [
        ("control_address", "127.0.0.1", "127.0.0.1:{}".format),
        ("data_address", "127.0.0.1", "tcp://127.0.0.1:{}".format),
        ("metrics_port", "0.0.0.0", int),
    ],
)
async def test_an_address_that_is_taken_is_named(
    start_worker: Fixture, setting: str, host: str, form: Callable[[int], Any]
) -> None:
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=str(port)):
            await start_worker(**{setting: form(port)})


@pytest.mark.parametrize("name", ["control", "data"])
async def test_a_socket_of_a_living_worker_is_refused_and_one_of_a_dead_worker_is_taken_over(
    start_worker: Fixture, connect: Fixture, tmp_path: Path, name: str
) -> None:
    path = str(tmp_path / "worker.sock")
    address = {f"{name}_address": f"unix:{path}" if name == "control" else f"unix://{path}"}
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(path)
    running = await start_worker(**address)
    with pytest.raises(CannotListen, match=r"worker\.sock"):
        await start_worker(**address)
    await connect(running.identity).open()


@pytest.mark.parametrize(
    ("hello", "names"),
    [({"worker_epoch": 7}, "hello means epoch 7"), ({"model_fingerprint": b"\x01"}, "fingerprint 01")],
)
async def test_a_hello_for_another_worker_is_refused_naming_both(
    start_worker: Fixture, connect: Fixture, hello: dict[str, Any], names: str
) -> None:
    running = await start_worker()
    session = connect(running.identity)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await session.open(**hello)
    assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert names in (refused.value.details() or "")
    ours = running.identity
    assert str(ours.epoch) in refused.value.details() or ours.fingerprint.hex() in refused.value.details()


async def test_a_session_that_does_not_begin_with_hello_is_refused(
    start_worker: Fixture, connect: Fixture
) -> None:
    running = await start_worker()
    session = connect(running.identity)
    await session.abort("r")
    assert await session.status() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_silent_peer_is_not_waited_for(
    start_worker: Fixture, connect: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HELLO_TIMEOUT_S", 0.05)
    running = await start_worker()
    session = connect(running.identity)
    assert await session.status() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_second_hello_ends_the_session(start_worker: Fixture, connect: Fixture) -> None:
    running = await start_worker()
    session = connect(running.identity)
    await session.open()
    await session.call.write(worker_pb2.SessionRequest(hello=worker_pb2.Hello()))
    assert await session.status() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "no tokens"),
        ({"prompt": [260]}, "260"),
        ({"prompt": [5] * 512}, "512 tokens"),
        ({"prompt": [2**32 - 1] * 2**20}, "1048576 tokens"),
        ({"temperature": math.nan}, "temperature must be between"),
        ({"top_p": 2.0}, "top_p must be between"),
        ({"max_tokens": 0}, "max_tokens must be between"),
        ({"logit_bias": {999: 1.0}}, "999"),
        ({"stop_strings": [""]}, "non-empty strings"),
        ({"purpose": 9}, "purpose must be"),
        ({"output_token_ids": [1, 2], "max_tokens": 2}, "max_tokens"),
    ],
)
async def test_a_bad_submit_fails_alone(
    start_worker: Fixture, open_session: Fixture, fields: dict[str, Any], message: str
) -> None:
    running = await start_worker()
    session = await open_session(running)
    bad = await session.submit("bad", **({"prompt": PROMPT} | fields))
    good = await session.submit("good", PROMPT, max_tokens=2)
    await bad.wait()
    assert bad.last.finish_reason == worker_pb2.FINISH_ERROR
    assert bad.last.failure.code == worker_pb2.Failure.INVALID
    assert message in bad.last.failure.message
    assert len((await good.wait()).token_ids) == 2


async def test_a_request_id_in_use_is_refused(start_worker: Fixture, open_session: Fixture) -> None:
    running = await start_worker()
    session, other = await open_session(running), await open_session(running)
    first = await session.submit("r", PROMPT, max_tokens=200, ignore_eos=True)
    await first.began.wait()
    # Another gateway, or the same one on a new connection: the old request may be on its way out.
    theirs = await (await other.submit("r", PROMPT)).wait()
    assert theirs.last.failure.code == worker_pb2.Failure.OVERLOADED
    assert theirs.last.failure.retry_after_s > 0
    assert len((await first.wait()).token_ids) == 200


async def test_a_full_queue_answers_overloaded(start_worker: Fixture, open_session: Fixture) -> None:
    running = await start_worker(max_num_waiting=2, max_num_seqs=1)
    session = await open_session(running)
    answers = [await session.submit(f"r{i}", PROMPT, max_tokens=50, ignore_eos=True) for i in range(8)]
    refused = []
    for answer in answers:
        await answer.wait()
        if answer.last.finish_reason == worker_pb2.FINISH_ERROR:
            assert answer.last.failure.code == worker_pb2.Failure.OVERLOADED
            assert answer.last.failure.retry_after_s > 0
            refused.append(answer)
        else:
            assert len(answer.token_ids) == 50
    assert 1 <= len(refused) <= 6


async def test_a_gateway_that_does_not_read_loses_its_session_and_its_requests(
    start_worker: Fixture, connect: Fixture, open_session: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "Outbox", functools.partial(Outbox, max_steps=4))
    running = await start_worker(max_num_waiting=100)
    # By default gRPC takes megabytes before it pushes back.
    slow = connect(running.identity, [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)])
    await slow.open()
    answers = [
        await slow.submit(f"slow{number}", PROMPT, max_tokens=400, ignore_eos=True, num_logprobs=20)
        for number in range(64)
    ]
    await running.settled()
    slow.listen()
    assert await slow.status() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not answers[-1].token_ids
    session = await open_session(running)
    assert len((await (await session.submit("r", PROMPT, max_tokens=3)).wait()).token_ids) == 3


async def test_closing_a_session_aborts_its_requests_and_no_others(
    start_worker: Fixture, open_session: Fixture
) -> None:
    running = await start_worker()
    leaving, staying = await open_session(running), await open_session(running)
    answers = [await leaving.submit(f"r{i}", PROMPT, max_tokens=400, ignore_eos=True) for i in range(4)]
    stays = await staying.submit("stays", PROMPT, max_tokens=40, ignore_eos=True)
    await answers[0].began.wait()
    await leaving.close()
    assert len((await stays.wait()).token_ids) == 40
    await running.settled()
    assert not any(answer.ended.is_set() for answer in answers)


_FROZEN_GATEWAY = """
import sys, grpc
from protos import worker_pb2, worker_pb2_grpc
address, epoch, fingerprint = sys.argv[1], int(sys.argv[2]), bytes.fromhex(sys.argv[3])
sampling = worker_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0, max_tokens=400, ignore_eos=True)
def messages():
    yield worker_pb2.SessionRequest(hello=worker_pb2.Hello(worker_epoch=epoch, model_fingerprint=fingerprint))
    for i in range(500):
        submit = worker_pb2.Submit(request_id=str(i), prompt_token_ids=[5] * 20, sampling=sampling)
        yield worker_pb2.SessionRequest(submit=submit)
    print("submitted", flush=True)
    sys.stdin.read()
for event in worker_pb2_grpc.WorkerStub(grpc.insecure_channel(address)).Session(messages()):
    pass
"""


async def test_a_frozen_gateway_is_noticed_without_a_word_from_it(start_worker: Fixture) -> None:
    # One request at a time: what the gateway submits is work for minutes.
    running = await start_worker(max_num_seqs=1)
    identity = running.identity
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _FROZEN_GATEWAY, identity.control_address, str(identity.epoch),
        identity.fingerprint.hex(), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert gateway.stdout is not None
    try:
        async with asyncio.timeout(20):
            while await gateway.stdout.readline() != b"submitted\n":
                pass
        gateway.send_signal(signal.SIGSTOP)
        await running.settled()
    finally:
        gateway.kill()
        await gateway.communicate()
