"""Workers that are drained under load: no client notices, and `penstock drain` says what happens."""

import subprocess
import sys

from openai import OpenAI

from bench.cluster import RunningCluster, running_cluster
from control_plane.runtimes.state import Status
from tests.end_to_end.asking import ask_all, fields, prompt, state, wait_until

MIXED_PAIR = {"pools": {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "mixed": {"replicas": 2}}}
NUM_TOKENS = 300


def penstock(cluster: RunningCluster, *arguments: str) -> str:
    command = [sys.executable, "-m", "control_plane.cli", *arguments, "--run-dir", str(cluster.run_dir)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def status(cluster: RunningCluster, worker: str) -> Status:
    return next(process.status for process in state(cluster).processes if process.name == worker)


def test_both_workers_are_restarted_in_turn_while_they_serve_and_one_is_taken_out_and_brought_back() -> None:
    with (
        running_cluster(MIXED_PAIR) as cluster,
        OpenAI(base_url=cluster.url, api_key="unused", max_retries=0, timeout=60) as client,
    ):
        prompts = [prompt(seed, 40) for seed in range(6)]
        expected = [answer.text for answer in ask_all(client, prompts, max_tokens=NUM_TOKENS)]
        for worker in ("mixed-0", "mixed-1"):
            streams = [
                client.completions.create(**fields(one, max_tokens=NUM_TOKENS), stream=True)
                for one in prompts
            ]
            texts = [next(stream).choices[0].text for stream in map(iter, streams)]
            said = penstock(cluster, "drain", worker, "--restart")
            assert said.startswith(f"{worker} takes no new requests")
            assert said.endswith(f"{worker} has gone\n")
            for index, stream in enumerate(streams):
                texts[index] += "".join(event.choices[0].text for event in stream)
            assert texts == expected
            wait_until(lambda worker=worker: status(cluster, worker) is Status.READY)
        assert "penstock resume mixed-0 starts it again" in penstock(cluster, "drain", "mixed-0")
        wait_until(lambda: status(cluster, "mixed-0") is Status.DRAINED)
        assert [answer.text for answer in ask_all(client, prompts, max_tokens=NUM_TOKENS)] == expected
        penstock(cluster, "resume", "mixed-0")
        wait_until(lambda: status(cluster, "mixed-0") is Status.READY)
