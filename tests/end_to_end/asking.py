"""Greedy answers of a cluster, what they cost, and what its workers hold."""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from openai import OpenAI

from bench.cluster import RunningCluster
from control_plane.cli.tiers import describe, find_workers
from control_plane.runtimes.state import RunState, read_state
from protos import kv_pb2, worker_pb2

MODEL = "penstock-demo"
PROMPT_TOKENS = 640  # 40 blocks
# The last token is always computed, so that its block is.
LOADABLE_TOKENS = PROMPT_TOKENS - 16
WAIT_S = 60.0
SYSTEM = "You answer in one word. " * 60

Tiers = dict[tuple[str, str], kv_pb2.TierDescription]


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    num_cached_tokens: int


def prompt(seed: int, num_tokens: int = PROMPT_TOKENS) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300, 1900) for _ in range(num_tokens)]


def fields(token_ids: Sequence[int], *, salt: str = "", max_tokens: int = 12) -> dict[str, Any]:
    """Of a request that always answers with the same `max_tokens` tokens."""
    extra = {"cache_salt": salt, "ignore_eos": True}
    return {
        "model": MODEL, "prompt": list(token_ids), "max_tokens": max_tokens, "temperature": 0, "extra_body": extra
    }  # fmt: skip


def ask(client: OpenAI, token_ids: Sequence[int], **chosen: Any) -> Answer:
    reply = client.completions.create(**fields(token_ids, **chosen))
    return Answer(reply.choices[0].text, num_cached(reply.usage))


def ask_all(client: OpenAI, prompts: Iterable[Sequence[int]], **chosen: Any) -> list[Answer]:
    return [ask(client, token_ids, **chosen) for token_ids in prompts]


def converse(client: OpenAI, questions: list[str], between: Callable[[], None]) -> list[tuple[str, int]]:
    """What is answered at each turn, and how much of the prompt was not computed for it."""
    messages = [{"role": "system", "content": SYSTEM}]
    turns = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        reply = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=0, max_tokens=32, extra_body={"ignore_eos": True}
        )
        text = reply.choices[0].message.content
        turns.append((text, num_cached(reply.usage)))
        messages.append({"role": "assistant", "content": text})
        between()
    return turns


def num_cached(usage: Any) -> int:
    details = usage.prompt_tokens_details
    return details.cached_tokens or 0 if details is not None else 0


def state(cluster: RunningCluster) -> RunState:
    found = read_state(cluster.run_dir)
    assert found is not None
    return found


def workers(cluster: RunningCluster) -> list[worker_pb2.WorkerDescription]:
    return find_workers(state(cluster))


def tiers(cluster: RunningCluster) -> Tiers:
    """Of every worker that answers."""
    answers = describe(workers(cluster), num_prefixes=0)
    return {
        (answer.worker.worker_id, tier.name): tier
        for answer in answers
        if answer.reply is not None
        for tier in answer.reply.tiers
    }


def gauge(url: str, name: str) -> float:
    """Of a gateway, by its address; 0 if it does not say."""
    lines = httpx.get(f"{url}/metrics", timeout=10).text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)


def wait_until(holds: Callable[[], object], *, within_s: float = WAIT_S) -> None:
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


def is_idle(worker: worker_pb2.WorkerDescription) -> bool:
    """No request, and every page free; what a store reports as taken are the blocks it keeps."""
    load = worker.load
    has_pages = worker.role == worker_pb2.ROLE_STORE or load.num_free_pages == load.num_pages
    return has_pages and not (load.num_running or load.num_waiting or load.num_leases)
