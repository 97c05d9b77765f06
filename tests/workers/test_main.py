"""The worker as a process: how it starts, refuses, stops, and what its death means to others."""

import asyncio
import os
import shutil
import signal
import socket
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import worker_pb2, worker_pb2_grpc
from tests.workers.worker_process import WorkerProcess
from workers.config import Role
from workers.model.checkpoint import Checkpoint
from workers.model.info import load_model_info

Fixture = Any
PROMPT = [(7 * i) % 250 + 3 for i in range(300)]
SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 1234, "max_tokens": 24, "ignore_eos": True}


@pytest.mark.parametrize(
    ("flags", "more", "message"),
    [
        ({}, ["--max-num-sequences", "4"], "unrecognized arguments: --max-num-sequences 4"),
        ({}, ["--max-num"], "unrecognized arguments: --max-num"),
        ({"model_path": None}, [], "the following arguments are required: --model-path"),
        ({"role": "expert"}, [], "must be one of prefill, decode, mixed, store, got 'expert'"),
        ({"num_pages": "many"}, [], "--num-pages: invalid int value: 'many'"),
        ({"dtype": "int3"}, [], "dtype must be one of float32, bfloat16, got 'int3'"),
        ({"lease_s": "-1"}, [], "lease_s must be a positive number of seconds, got -1.0"),
        ({"cores": "0,x"}, [], "--cores"),
        ({"cores": "4000"}, [], "cores (4000,) cannot be used; there are"),
        ({"data_address": "127.0.0.1:1"}, [], "127.0.0.1:1"),
    ],
)
async def test_a_wrong_flag_ends_it_with_2_and_says_which(
    start_process: Fixture, flags: dict[str, str], more: list[str], message: str
) -> None:
    worker = await start_process(*more, **flags)
    assert await worker.ended() == 2
    assert message in worker.log[-1]
    assert "Traceback" not in worker.log[-1]


async def _refused(worker: WorkerProcess) -> str:
    """What a worker says that ends before it is ready."""
    event = await worker.event("refused")
    assert await worker.ended() == 2
    assert "Traceback" not in "".join(worker.log)
    return str(event["detail"])


async def test_a_checkpoint_that_is_not_there_ends_it_with_2(start_process: Fixture, tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in await _refused(await start_process(model_path=tmp_path / "nothing"))


async def test_a_device_that_is_not_there_ends_it_with_2_before_anything_is_loaded(
    start_process: Fixture,
) -> None:
    worker = await start_process(device="cuda:99")
    assert "device cuda:99 is not there: torch finds" in await _refused(worker)
    assert '"event": "loading"' not in "".join(worker.log)


async def test_a_truncated_checkpoint_ends_it_with_2(
    start_process: Fixture, checkpoint: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    assert "model.safetensors" in await _refused(await start_process(model_path=broken))


async def test_a_port_that_is_taken_ends_it_with_2(start_process: Fixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert address in await _refused(await start_process(control_address=address))


async def test_a_signal_ends_it_with_0_and_leaves_no_socket(
    start_process: Fixture, connect: Fixture, tmp_path: Path
) -> None:
    worker = await start_process(
        control_address=f"unix:{tmp_path}/control.sock", data_address=f"unix://{tmp_path}/data.sock"
    )
    identity = await worker.ready()
    assert sorted(os.listdir(tmp_path)) == ["control.sock", "data.sock"]
    session = connect(identity)
    await session.open()
    session.listen()
    answer = await session.submit("r", PROMPT, max_tokens=200, ignore_eos=True)
    await answer.began.wait()
    worker.process.send_signal(signal.SIGTERM)
    assert await worker.ended() == 0
    assert '"event": "stopped"' in worker.log[-1]
    assert os.listdir(tmp_path) == []


async def test_a_store_ends_with_0_and_leaves_its_disk_and_no_socket(
    start_process: Fixture, tmp_path: Path
) -> None:
    sockets, disk = tmp_path / "sockets", tmp_path / "disk"
    sockets.mkdir()
    disk.mkdir()
    store = await start_process(
        role="store", control_address=f"unix:{sockets}/control.sock", data_address=f"unix://{sockets}/data.sock",
        disk_tier_path=disk,
    )  # fmt: skip
    identity = await store.ready()
    assert identity.role is Role.STORE
    assert sorted(os.listdir(sockets)) == ["control.sock", "data.sock"]
    store.process.send_signal(signal.SIGTERM)
    assert await store.ended() == 0
    assert '"event": "stopped"' in store.log[-1]
    assert os.listdir(sockets) == []


async def test_a_disk_tier_larger_than_the_disk_ends_it_with_2(
    start_process: Fixture, tmp_path: Path
) -> None:
    detail = await _refused(await start_process(disk_tier_path=tmp_path, disk_tier_bytes=10**17))
    assert f"disk_tier_bytes {10**17} is more than" in detail


@pytest.mark.parametrize("role", ["store", "decode"])
async def test_a_disk_tier_that_cannot_be_used_ends_it_with_2(
    start_process: Fixture, tmp_path: Path, role: str
) -> None:
    (tmp_path / "a-file").touch()
    detail = await _refused(await start_process(role=role, disk_tier_path=tmp_path / "a-file"))
    assert str(tmp_path / "a-file") in detail


async def test_a_quantized_worker_serves_and_is_another_model_to_its_peers(
    start_process: Fixture, connect: Fixture, checkpoint: Path
) -> None:
    identity = await (await start_process(quantize="int8")).ready()
    files = Checkpoint(checkpoint)
    exact, int8 = (
        load_model_info(checkpoint, files, dtype="float32", quantize=quantize, max_model_len=None)
        for quantize in ("none", "int8")
    )
    assert identity.fingerprint == int8.fingerprint != exact.fingerprint
    session = connect(identity)
    await session.open()
    session.listen()
    answer = await session.submit("r", PROMPT, max_tokens=5, ignore_eos=True)
    assert len((await answer.wait()).token_ids) == 5


async def test_a_signal_while_it_loads_ends_it_with_0(start_process: Fixture) -> None:
    worker = await start_process()
    await worker.event("loading_kernels")
    worker.process.send_signal(signal.SIGINT)
    assert await worker.ended() == 0


async def test_metrics_are_served_where_others_look_for_them(
    start_process: Fixture, connect: Fixture, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    worker = await start_process(metrics_port=port)
    session = connect(await worker.ready())
    await session.open()
    session.listen()
    await (await session.submit("r", PROMPT, max_tokens=5, ignore_eos=True)).wait()
    values = await asyncio.to_thread(_metrics, port)
    label = '{model_name="tiny"}'
    assert float(values[f"vllm:prompt_tokens_total{label}"]) == 300
    assert float(values[f"vllm:generation_tokens_total{label}"]) == 5
    assert float(values[f"vllm:inter_token_latency_seconds_count{label}"]) == 4
    for histogram in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert float(values[f"vllm:{histogram}_seconds_count{label}"]) == 1
    for gauge in ("num_requests_running", "num_requests_waiting"):
        assert float(values[f"vllm:{gauge}{label}"]) == 0
    async with asyncio.timeout(10):  # pages are pinned until their blocks are in memory
        while float(values[f"vllm:kv_cache_usage_perc{label}"]) > 0:
            values = await asyncio.to_thread(_metrics, port)
    assert 'vllm:cache_config_info{block_size="16",model_name="tiny",num_gpu_blocks="64"}' in values


def _metrics(port: int) -> dict[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        page = reply.read().decode()
    return dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))


# What the sudden death of a prefill worker means to a decode worker: nothing that a client could see.


async def _expected(start_worker: Fixture, open_session: Fixture) -> list[int]:
    session = await open_session(await start_worker(Role.MIXED))
    answer = await (await session.submit("r", PROMPT, **SEEDED)).wait()
    return list(answer.token_ids)


async def test_a_prefill_worker_killed_before_the_hand_over_is_not_missed(
    start_process: Fixture, start_worker: Fixture, open_session: Fixture
) -> None:
    expected = await _expected(start_worker, open_session)
    prefill = await start_process(role="prefill")
    source = await prefill.ready()
    decode = await start_worker(Role.DECODE)
    session = await open_session(decode)
    prefill.kill()
    await prefill.ended()
    answer = await (await session.submit("r", PROMPT, kv_source=source, **SEEDED)).wait()
    assert answer.token_ids == expected
    assert "pull_failed" in [event.name for event in answer.last.timeline]
    await decode.settled()


async def test_a_prefill_worker_killed_during_the_hand_over_is_not_missed(
    start_process: Fixture, start_worker: Fixture, open_session: Fixture, connect: Fixture
) -> None:
    expected = await _expected(start_worker, open_session)
    # One token a step: the prompt takes 300 steps, and its blocks leave one by one.
    prefill = await start_process(role="prefill", max_num_seqs=1, max_num_batched_tokens=1)
    source = await prefill.ready()
    decode = await start_worker(Role.DECODE)
    to_prefill, to_decode = connect(source), await open_session(decode)
    await to_prefill.open()
    answer = await to_decode.submit("r", PROMPT, kv_source=source, **SEEDED)
    await to_prefill.submit("r", PROMPT, purpose=worker_pb2.Submit.PREFILL_ONLY, **SEEDED)
    async with grpc.aio.insecure_channel(source.control_address) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        while True:  # until it is half-way
            load = (await stub.Describe(worker_pb2.DescribeRequest(), timeout=10.0)).load
            if 0 < load.num_waiting_tokens < len(PROMPT) // 2:
                break
            assert load.num_leases == 0, "too late, it is done"
        prefill.kill()
    await prefill.ended()
    await answer.wait()
    assert answer.token_ids == expected
    assert "pull_failed" in [event.name for event in answer.last.timeline]
    await decode.settled()


async def test_a_prefill_worker_killed_after_the_hand_over_is_not_missed(
    start_process: Fixture, start_worker: Fixture, open_session: Fixture, connect: Fixture
) -> None:
    expected = await _expected(start_worker, open_session)
    prefill = await start_process(role="prefill")
    source = await prefill.ready()
    decode = await start_worker(Role.DECODE)
    to_prefill, to_decode = connect(source), await open_session(decode)
    await to_prefill.open()
    to_prefill.listen()
    first = await to_prefill.submit("r", PROMPT, purpose=worker_pb2.Submit.PREFILL_ONLY, **SEEDED)
    answer = await to_decode.submit("r", PROMPT, kv_source=source, **SEEDED)
    await answer.began.wait()
    prefill.kill()
    await prefill.ended()
    await answer.wait()
    assert answer.token_ids == expected
    assert first.token_ids == expected[:1]
    assert "pull_done" in [event.name for event in answer.last.timeline]
    await decode.settled()
