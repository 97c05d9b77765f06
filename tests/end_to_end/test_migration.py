"""`penstock migrate` in mid-stream, between two real workers: the client sees what it would have seen without."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from typer.testing import CliRunner

from bench.cluster import RunningCluster, running_cluster
from control_plane.cli.__main__ import app
from tests.end_to_end.asking import fields, is_idle, prompt, wait_until, workers

TWO_MIXED = {
    "pools": {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "mixed": {"replicas": 2}},
    # Requests move when this test says so, and only then.
    "migration": {"enabled": False},
}
MAX_TOKENS = 1200  # some seconds, in which the command is called twice
PROMPTS = {"short": 40, "long": 640}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0.3},
}


@pytest.fixture(scope="module")
def two_mixed() -> Iterator[RunningCluster]:
    with running_cluster(TWO_MIXED) as cluster:
        penstock(cluster, "top", "--once")  # what the commands import takes longer than a move
        yield cluster


@pytest.fixture(scope="module")
def client(two_mixed: RunningCluster) -> Iterator[OpenAI]:
    with OpenAI(base_url=two_mixed.url, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def request_of(name: str, sampling: str, *, salt: str) -> dict[str, Any]:
    asked = fields(prompt(len(name), PROMPTS[name]), salt=salt, max_tokens=MAX_TOKENS)
    return {**asked, **SAMPLING[sampling], "logprobs": 1, "stream": True}


def penstock(cluster: RunningCluster, *arguments: str) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--run-dir", str(cluster.run_dir)])
    assert result.exit_code == 0, result.output
    return result.stdout


def other_worker(cluster: RunningCluster, request_id: str) -> str:
    """Of two, the one on which the request does not run."""
    listed = cluster.get("/admin/requests")["requests"]
    (here,) = [each["worker"] for each in listed if each["request_id"] == request_id]
    return next(worker.worker_id for worker in workers(cluster) if worker.worker_id != here)


def streamed(
    client: OpenAI, asked: dict[str, Any], *, cluster: RunningCluster | None, moves_at: tuple[int, ...]
) -> Any:
    """Tokens and logprobs of a stream in which the request moves once so many tokens have come."""
    tokens: list[str] = []
    logprobs: list[float] = []
    reports = []
    waiting = list(moves_at)
    with contextlib.closing(client.completions.create(**asked)) as stream:
        for event in stream:
            choice = event.choices[0]
            if choice.logprobs is not None:
                tokens += choice.logprobs.tokens or []
                logprobs += choice.logprobs.token_logprobs or []
            if cluster is not None and waiting and len(tokens) >= waiting[0]:
                waiting.pop(0)
                request_id = f"{event.id}-0"
                to = other_worker(cluster, request_id)
                reports.append(json.loads(penstock(cluster, "migrate", request_id, "--to", to, "--json")))
    return tokens, logprobs, reports


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("name", PROMPTS)
def test_a_stream_that_moves_there_and_back_is_the_stream_that_stays(
    two_mixed: RunningCluster, client: OpenAI, name: str, sampling: str
) -> None:
    undisturbed = request_of(name, sampling, salt=f"{name}-{sampling}-stays")
    tokens, logprobs, _ = streamed(client, undisturbed, cluster=None, moves_at=())
    assert len(tokens) == MAX_TOKENS
    moving = request_of(name, sampling, salt=f"{name}-{sampling}-moves")
    moved_tokens, moved_logprobs, reports = streamed(client, moving, cluster=two_mixed, moves_at=(20, 120))
    assert [report["outcome"] for report in reports] == ["moved", "moved"]
    assert [report["source"] for report in reports] == [report["target"] for report in reversed(reports)]
    # A target that could not pull it would have refused it: it never computes it again.
    assert moved_tokens == tokens
    assert moved_logprobs == pytest.approx(logprobs, abs=1e-3)


def test_afterwards_nothing_is_left_and_everybody_can_see_what_moved(
    two_mixed: RunningCluster, client: OpenAI
) -> None:
    asked = request_of("short", "greedy", salt="last")
    _, _, (report,) = streamed(client, asked, cluster=two_mixed, moves_at=(10,))
    wait_until(lambda: all(map(is_idle, workers(two_mixed))))
    assert two_mixed.get("/admin/requests")["requests"] == []
    picture = penstock(two_mixed, "top", "--once")
    assert f"{report['request_id']}: {report['source']} -> {report['target']}: moved" in " ".join(
        picture.split()
    )
