"""A cluster whose workers compute as on a GPU, with the formulas of its kernels and KV of 8 bits: nobody who asks can
tell."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from bench.cluster import RunningCluster, running_cluster
from tests.end_to_end.asking import ask, is_idle, prompt, tiers, wait_until, workers

DEVICE = {"device": "cpu", "attention": "reference"}
# Few: these formulas are slow. More than are computed by the decode worker itself.
PROMPT = prompt(21, num_tokens=112)


@pytest.fixture(scope="module")
def on_devices() -> Iterator[RunningCluster]:
    settings = {
        "model": {"kv_dtype": "int8"},
        "routing": {"prefill_threshold_tokens": 32},
        "pools": {"prefill": {"replicas": 1, **DEVICE}, "decode": {"replicas": 1, **DEVICE}},
    }
    with running_cluster(settings) as cluster:
        yield cluster


def test_a_prompt_handed_over_between_devices_is_answered_as_ever(
    on_devices: RunningCluster, plain: OpenAI
) -> None:
    with OpenAI(base_url=on_devices.url, api_key="unused", max_retries=0, timeout=60) as client:
        expected = ask(plain, PROMPT)
        assert ask(client, PROMPT).text == expected.text
        # Written behind out of both workers' pages; and the pages answer again.
        wait_until(lambda: all(map(is_idle, workers(on_devices))))
        held = tiers(on_devices)
        assert held["prefill-0", "memory"].num_blocks == len(PROMPT) // 16
        again = ask(client, PROMPT)
    assert (again.text, again.num_cached_tokens) == (expected.text, len(PROMPT) - 16)
