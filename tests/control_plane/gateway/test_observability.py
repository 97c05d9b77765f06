import json
import logging
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from control_plane.errors import GenerationFailed, QueueFull
from control_plane.gateway.timeline import stage_durations
from control_plane.gateway.tokenizer import TextTokenizer
from control_plane.generation import FinishReason, TokenChunk, WorkerEvent
from tests.control_plane.gateway.conftest import ANSWER
from tests.control_plane.gateway.scripted import MODEL, ScriptedDispatcher, worker_like

BODY = {"model": MODEL, "prompt": "x", "max_tokens": 200}


async def samples(http: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """Sample values by name and label values, these in alphabetical order; without buckets."""
    text = (await http.get("/metrics")).text
    families = text_string_to_metric_families(text)
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
        if "le" not in sample.labels
    }


async def test_one_request_feeds_every_metric(
    http: httpx.AsyncClient,
    client: openai.AsyncOpenAI,
    dispatcher: ScriptedDispatcher,
    tokenizer: TextTokenizer,
) -> None:
    stream = await client.completions.create(**BODY, stream=True)  # type: ignore[call-overload]
    num_prompt_tokens = len(dispatcher.generations[0].prompt_token_ids)
    assert [chunk async for chunk in stream]
    num_tokens = len(tokenizer.encode(ANSWER, add_special_tokens=False)) + 1
    seen = await samples(http)
    assert seen["vllm:prompt_tokens_total", MODEL] == num_prompt_tokens
    assert seen["vllm:generation_tokens_total", MODEL] == num_tokens
    assert seen["vllm:request_success_total", MODEL, "stop"] == 1
    assert seen["vllm:time_to_first_token_seconds_count", MODEL] == 1
    assert seen["vllm:inter_token_latency_seconds_count", MODEL] == num_tokens - 1
    assert seen["vllm:e2e_request_latency_seconds_count", MODEL] == 1
    assert seen["penstock_gateway_requests_total", "200", "http"] == 1
    assert seen["penstock_gateway_open_streams",] == 0
    assert seen["penstock_gateway_intake_seconds_count",] == 1


async def test_refusals_and_failures_are_counted_by_code(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    await http.post("/v1/completions", content=b"{")
    dispatcher.script = lambda generation: [QueueFull("full", retry_after_s=1)]
    await http.post("/v1/completions", json=BODY)
    seen = await samples(http)
    assert seen["penstock_gateway_requests_total", "400", "http"] == 1
    assert seen["penstock_gateway_requests_total", "429", "http"] == 1
    assert seen["vllm:request_success_total", MODEL, "error"] == 1


def log_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(r.getMessage()) for r in caplog.records if r.name == "penstock.gateway.request"]


async def test_each_request_writes_one_structured_log_line(
    http: httpx.AsyncClient,
    dispatcher: ScriptedDispatcher,
    tokenizer: TextTokenizer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    dispatcher.script = worker_like(tokenizer, ANSWER, num_cached_tokens=16)
    await http.post("/v1/completions", json=BODY | {"n": 2}, headers={"x-request-id": "mine-1"})
    await http.post("/v1/completions", content=b'{"prompt": "secret words"}')
    done, refused = log_lines(caplog)
    assert (done["request_id"], done["code"], done["operation"]) == ("mine-1", "200", "/v1/completions")
    assert done["finish_reasons"] == ["stop", "stop"]
    assert done["num_cached_tokens"] == 16
    assert 0 < done["intake_s"] <= done["time_to_first_token_s"] <= done["duration_s"]
    assert refused["code"] == "400"
    assert "model" in refused["error"]
    assert "secret" not in json.dumps(refused)


def noted(**at_s: float) -> tuple[WorkerEvent, ...]:
    """Events by name, `there_` standing for `prefill.`."""
    return tuple(WorkerEvent(name.replace("there_", "prefill."), unix_s) for name, unix_s in at_s.items())


async def test_what_workers_noted_is_in_the_log_line_and_in_the_metrics(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    begun = noted(queued=1e9, scheduled=1e9 + 2, prefill_done=1e9 + 5)
    dispatcher.script = lambda generation: [
        TokenChunk(token_ids=(5,), events=begun),
        TokenChunk(token_ids=(6,)),
        TokenChunk(
            token_ids=(7,),
            finish_reason=FinishReason.LENGTH,
            events=(*begun, *noted(first_token=1e9 + 5, finished=1e9 + 9)),
        ),
    ]
    await http.post("/v1/completions", json=BODY)
    (line,) = log_lines(caplog)
    timeline = line["timeline"]
    assert [event["event"] for event in timeline if "choice" not in event] == [
        "gateway.received",
        "gateway.accepted",
        "gateway.first_token",
        "gateway.closed",
    ]
    assert [event["event"] for event in timeline if event.get("choice") == 0] == [
        "queued",
        "scheduled",
        "prefill_done",
        "first_token",
        "finished",
    ]
    assert [event["at_s"] for event in timeline] == sorted(event["at_s"] for event in timeline)
    assert (timeline[-1]["event"], timeline[-1]["at_s"]) == ("gateway.closed", line["duration_s"])
    seen = await samples(http)
    for stage, stage_s in {"queue": 2.0, "prefill": 3.0, "decode": 4.0}.items():
        assert seen["penstock_request_stage_seconds_count", *sorted((MODEL, stage))] == 1
        assert seen["penstock_request_stage_seconds_sum", *sorted((MODEL, stage))] == stage_s
    assert ("penstock_request_stage_seconds_count", MODEL, "pull") not in seen


async def test_a_request_that_failed_half_way_is_in_the_log_with_what_workers_noted_so_far(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    dispatcher.script = lambda generation: [
        TokenChunk(token_ids=(5,), events=noted(queued=1.0, scheduled=2.0)),
        GenerationFailed("lost"),
    ]
    await http.post("/v1/completions", json=BODY | {"stream": True})
    (line,) = log_lines(caplog)
    assert [event["event"] for event in line["timeline"] if "choice" in event] == ["queued", "scheduled"]
    assert (await samples(http))["penstock_request_stage_seconds_sum", MODEL, "queue"] == 1.0


def test_stages_are_measured_between_events_of_one_worker() -> None:
    # The prefill worker's clock is a thousand seconds ahead.
    disaggregated = noted(
        queued=1.0, scheduled=2.0, pull_started=2.0, there_queued=1001.0, there_scheduled=1001.5,
        there_prefill_done=1004.5, pull_done=8.0, prefill_done=8.0, first_token=8.0, finished=9.0,
    )  # fmt: skip
    assert stage_durations(disaggregated) == {"queue": 0.5, "prefill": 3.0, "pull": 6.0, "decode": 1.0}


def test_after_a_pull_that_failed_the_prefill_is_what_the_decode_worker_does_itself() -> None:
    events = noted(queued=1.0, scheduled=2.0, pull_started=2.0, pull_failed=5.0, prefill_done=6.0)
    assert stage_durations(events) == {"queue": 1.0, "prefill": 1.0}


def test_a_clock_set_back_makes_no_negative_stage() -> None:
    assert stage_durations(noted(queued=9.0, scheduled=8.0)) == {"queue": 0.0}


async def test_a_good_request_id_comes_back_and_others_are_replaced(http: httpx.AsyncClient) -> None:
    good = await http.get("/health", headers={"x-request-id": "a.b:c-1"})
    assert good.headers["x-request-id"] == "a.b:c-1"
    for bad in ("", "x" * 129, "a b", "é"):
        response = await http.get("/health", headers={"x-request-id": bad.encode("latin-1")})
        assert response.headers["x-request-id"].startswith("req-")
    refused = await http.post("/v1/completions", content=b"{", headers={"x-request-id": "r"})
    assert refused.headers["x-request-id"] == "r"


async def test_equal_request_ids_are_different_generations(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    for _ in range(2):
        await http.post("/v1/completions", json=BODY, headers={"x-request-id": "same"})
    assert len({generation.request_id for generation in dispatcher.generations}) == 2


async def test_ready_follows_the_dispatcher_and_health_does_not(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    assert (await http.get("/ready")).status_code == 200
    dispatcher.is_ready = False
    assert (await http.get("/ready")).status_code == 503
    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/version")).json()["version"]


async def test_a_bug_is_an_openai_error_without_our_insides(app: Any, dispatcher: ScriptedDispatcher) -> None:
    def broken(generation: object) -> Any:
        raise ZeroDivisionError("secret insides")

    dispatcher.script = broken
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        for num_choices in (1, 2):
            response = await http.post("/v1/completions", json=BODY | {"n": num_choices})
            assert response.status_code == 500
            assert response.json()["error"]["type"] == "server_error"
            assert "secret" not in response.text
            assert response.headers["x-request-id"].startswith("req-")
        assert (await samples(http))["vllm:request_success_total", *sorted((MODEL, "error"))] == 3
