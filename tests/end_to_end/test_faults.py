"""Killed workers, vanishing clients and Ctrl-C, against real processes."""

import asyncio
import itertools
import os
import random
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAI

from bench.cluster import RunningCluster, running_cluster
from bench.cutting import cut_connections, may_cut
from bench.shared_memory import segments_of
from bench.worker_client import watch_workers
from protos import worker_pb2

MODEL = "penstock-demo"
Connect = Callable[[RunningCluster], OpenAI]


def long_prompt(seed: int, num_tokens: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300, 1900) for _ in range(num_tokens)]


def is_idle(worker: worker_pb2.WorkerDescription) -> bool:
    load = worker.load
    return load.num_free_pages == load.num_pages and not (
        load.num_running or load.num_waiting or load.num_leases
    )


def num_fds(process: psutil.Process) -> int:
    """Without the segments of the disk tier, of which there are more the more it holds."""
    return process.num_fds() - sum("/segment-" in file.path for file in process.open_files())


async def wait_until_idle(
    cluster: RunningCluster, *, num_workers: int = 2
) -> list[worker_pb2.WorkerDescription]:
    """Follows the directory until every worker has all its pages free and no request or lease."""
    async with asyncio.timeout(20):
        async for workers in watch_workers(cluster.run_dir):
            if len(workers) == num_workers and all(is_idle(worker) for worker in workers):
                return workers
    raise AssertionError("unreachable")


async def test_pages_leases_and_sockets_return_to_zero_after_500_cancels(
    disaggregated: RunningCluster,
) -> None:
    generator = random.Random(1)
    await wait_until_idle(disaggregated)
    processes = [disaggregated.process("control_plane.gateway"), *disaggregated.worker_processes()]
    warm = AsyncOpenAI(base_url=disaggregated.url, api_key="unused", max_retries=0, timeout=60)
    await warm.completions.create(model=MODEL, prompt=long_prompt(0, 100), max_tokens=2)
    await warm.close()
    await wait_until_idle(disaggregated)
    before = {process.pid: num_fds(process) for process in processes}

    async def disconnect_somewhere(index: int) -> None:
        """Opens a stream and leaves it before the first token, after a few, or before the answer's head."""
        async with AsyncOpenAI(
            base_url=disaggregated.url,
            api_key="unused",
            max_retries=0,
            timeout=60,
            http_client=DefaultAsyncHttpxClient(verify=False),  # reading certificates takes 22 ms of each
        ) as client:
            num_events = generator.randrange(4)
            request = client.completions.create(
                model=MODEL,
                prompt=long_prompt(index, generator.randrange(8, 600)),
                max_tokens=400,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            if num_events == 0:
                task = asyncio.ensure_future(request)
                await asyncio.wait([task], timeout=generator.random() / 10)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                return
            stream = await request
            async for _ in stream:
                num_events -= 1
                if num_events == 0:
                    break
            await stream.close()

    gate = asyncio.Semaphore(32)

    async def bounded(index: int) -> None:
        async with gate:
            await disconnect_somewhere(index)

    await asyncio.gather(*(bounded(index) for index in range(500)))
    await wait_until_idle(disaggregated)
    after = {process.pid: num_fds(process) for process in processes}
    assert all(after[pid] <= before[pid] + 2 for pid in before), (before, after)


def test_a_prefill_worker_killed_mid_way_costs_its_clients_nothing(connect: Connect) -> None:
    settings = {
        "routing": {"prefill_threshold_tokens": 32},
        "pools": {"prefill": {"replicas": 1}, "decode": {"replicas": 1}},
    }
    with running_cluster(settings) as cluster:
        client = connect(cluster)
        requests = [long_prompt(seed, 900) for seed in range(4)]
        expected = complete_at_once(client, requests)
        streams = [start(client, prompt[1:]) for prompt in requests]
        cluster.process("prefill").send_signal(signal.SIGKILL)
        texts = ["".join(event.choices[0].text for event in stream) for stream in streams]
        assert texts == complete_at_once(client, [prompt[1:] for prompt in requests])
        assert complete_at_once(client, requests) == expected


@pytest.mark.parametrize("harm", ["killed", "stopped", "cut off"])
def test_requests_of_a_decode_worker_that_dies_hangs_or_is_cut_off_go_on_as_if_nothing_had_happened(
    connect: Connect, harm: str
) -> None:
    if harm == "cut off" and not may_cut():
        pytest.skip("sockets of other processes may not be borrowed here")
    with running_cluster({"pools": {"prefill": {"replicas": 0}, "decode": {"replicas": 2}}}) as cluster:
        client = connect(cluster)
        asked = [(long_prompt(seed, 60), temperature) for seed, temperature in enumerate((0.0, 0.9) * 2)]
        expected = complete_at_once(client, *zip(*asked, strict=True))
        streams = [start(client, prompt, temperature=temperature) for prompt, temperature in asked]
        texts = [next(stream).choices[0].text for stream in map(iter, streams)]
        victim = cluster.worker_processes()[0]
        match harm:
            case "killed":
                victim.kill()
            case "stopped":
                victim.suspend()
            case "cut off":
                assert cut_connections(victim.pid) > 0
        try:
            for index, stream in enumerate(streams):
                texts[index] += "".join(event.choices[0].text for event in stream)
        finally:
            if harm == "stopped":
                victim.resume()
        assert texts == expected


def test_requests_of_the_only_worker_wait_until_it_has_been_started_again(connect: Connect) -> None:
    pools = {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "mixed": {"replicas": 1}}
    with running_cluster({"pools": pools}) as cluster:
        client = connect(cluster)
        prompts = [long_prompt(seed, 60) for seed in range(3)]
        expected = complete_at_once(client, prompts)
        streams = [start(client, prompt) for prompt in prompts[:2]]
        texts = [next(stream).choices[0].text for stream in map(iter, streams)]
        cluster.process("mixed").kill()
        late = complete(client, prompts[2])  # it comes while nobody is there
        for index, stream in enumerate(streams):
            texts[index] += "".join(event.choices[0].text for event in stream)
        assert [*texts, late] == expected


async def test_a_decode_worker_killed_while_it_pulls_costs_its_clients_nothing(mixed: RunningCluster) -> None:
    settings = {
        "routing": {"prefill_threshold_tokens": 32},
        "pools": {"prefill": {"replicas": 1}, "decode": {"replicas": 2}},
    }
    prompts = [long_prompt(seed, 500) for seed in range(70, 74)]
    expected = await complete_all(mixed, prompts)
    with running_cluster(settings) as cluster:
        # Whoever has no connection to it yet finds out at once that it does not answer.
        await complete_all(cluster, [long_prompt(seed, 100) for seed in range(60, 64)])
        await wait_until_idle(cluster, num_workers=3)
        prefill = cluster.process("prefill")
        async with asyncio.TaskGroup() as tasks:
            prefill.suspend()  # so that whoever pulls from it still pulls when it dies
            try:
                texts = tasks.create_task(complete_all(cluster, prompts))
                cluster.process(await busy_decode_worker(cluster)).kill()
            finally:
                prefill.resume()
        assert texts.result() == expected


async def complete_all(cluster: RunningCluster, prompts: list[list[int]]) -> list[str]:
    async with AsyncOpenAI(base_url=cluster.url, api_key="unused", max_retries=0, timeout=60) as client:
        requests = [
            client.completions.create(
                model=MODEL, prompt=prompt, max_tokens=64, temperature=0, extra_body={"ignore_eos": True}
            )
            for prompt in prompts
        ]
        return [reply.choices[0].text for reply in await asyncio.gather(*requests)]


async def busy_decode_worker(cluster: RunningCluster) -> str:
    """The id of a decode worker that has requests, as soon as the directory knows of one."""
    async with asyncio.timeout(20):
        async for workers in watch_workers(cluster.run_dir):
            for worker in workers:
                if worker.role == worker_pb2.ROLE_DECODE and worker.load.num_running:
                    return worker.worker_id
    raise AssertionError("unreachable")


def test_without_any_decode_worker_left_requests_fail_clearly(connect: Connect) -> None:
    settings = {
        "gateway": {"worker_wait_s": 1.0},
        "pools": {"prefill": {"replicas": 1}, "decode": {"replicas": 1}},
    }
    with running_cluster(settings) as cluster:
        client = connect(cluster)
        stream = start(client, long_prompt(1, 200))
        next(iter(stream))
        for process in cluster.worker_processes():
            process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(openai.APIError, match="worker"):
                list(stream)
            with pytest.raises(openai.APIStatusError, match="worker"):
                complete(client, long_prompt(2, 50))
        finally:
            for process in cluster.worker_processes():
                process.send_signal(signal.SIGCONT)


def test_ctrl_c_leaves_no_process_socket_or_shared_memory_behind() -> None:
    with running_cluster({}) as cluster:
        processes = [cluster.launcher, *cluster.launcher.children(recursive=True)]
        segments = segments_of(process.pid for process in processes)
        sockets = cluster.run_dir / "sockets"
        assert len(processes) >= 4
        assert list(sockets.iterdir())
        os.kill(cluster.launcher.pid, signal.SIGINT)
        _, alive = psutil.wait_procs(processes, timeout=20)
        assert alive == []
        assert not sockets.exists() or list(sockets.iterdir()) == []
        assert [path for path in segments if path.exists()] == []


def complete_at_once(
    client: OpenAI, prompts: Sequence[list[int]], temperatures: Iterable[float] = itertools.repeat(0.0)
) -> list[str]:
    with ThreadPoolExecutor(len(prompts)) as threads:
        return list(
            threads.map(
                lambda prompt, temperature: complete(client, prompt, temperature=temperature),
                prompts,
                temperatures,
            )
        )


def complete(client: OpenAI, prompt: list[int], *, temperature: float = 0.0) -> str:
    reply = client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=200,
        temperature=temperature,
        seed=5,
        extra_body={"ignore_eos": True},
    )
    return reply.choices[0].text


def start(
    client: OpenAI, prompt: list[int], *, temperature: float = 0.0
) -> "openai.Stream[openai.types.Completion]":
    return client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=200,
        temperature=temperature,
        seed=5,
        stream=True,
        extra_body={"ignore_eos": True},
    )
