import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from prometheus_client import CollectorRegistry
from schemathesis import Case, GenerationMode

from control_plane.gateway.admin import add_admin_api
from control_plane.gateway.app import create_app
from control_plane.gateway.dispatch import PoolDispatcher
from control_plane.gateway.metrics import GatewayMetrics
from control_plane.gateway.moves import Moves
from control_plane.gateway.settings import GatewaySettings
from control_plane.gateway.tokenizer import TextTokenizer
from tests.control_plane.fake_cluster import Cluster, make_generation
from tests.control_plane.fake_worker import FakeWorker

Served = tuple[FastAPI, PoolDispatcher]


@pytest.fixture
async def served(cluster: Cluster, tokenizer: TextTokenizer, settings: GatewaySettings) -> Served:
    dispatcher = cluster.dispatcher()
    metrics = GatewayMetrics(CollectorRegistry())
    app = create_app(dispatcher=dispatcher, tokenizer=tokenizer, settings=settings, metrics=metrics)
    moves = Moves(dispatcher.running, cluster.sessions, timeout_s=600, metrics=metrics)
    add_admin_api(app, moves, settings=settings)
    return app, dispatcher


@pytest.fixture
async def http(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(served[0])
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


async def test_lists_what_runs_and_moves_it(
    http: httpx.AsyncClient, cluster: Cluster, served: Served
) -> None:
    await cluster.start(FakeWorker("a", max_answer_tokens=2))
    stream = served[1].generate(make_generation(request_id="r", max_tokens=4, priority=3))
    tokens = list((await anext(stream)).token_ids)
    await cluster.start(FakeWorker("b"))
    (listed,) = (await http.get("/admin/requests")).json()["requests"]
    assert listed.pop("age_s") >= 0
    assert listed == {
        "request_id": "r",
        "worker": "a",
        "pool": "decode",
        "num_prompt_tokens": 8,
        "num_output_tokens": len(tokens),
        "priority": 3,
        "moving_to": None,
    }
    answer = await http.post("/admin/requests/r/move", json={"worker": "b"})
    assert answer.status_code == 200
    report = answer.json()
    assert (report["source"], report["target"], report["outcome"]) == ("a", "b", "moved")
    assert (report["reason"], report["duration_s"] > 0) == ("operator", True)
    listed = (await http.get("/admin/requests")).json()
    assert [request["worker"] for request in listed["requests"]] == ["b"]
    assert listed["recent_moves"] == [report]
    tokens += [token async for chunk in stream for token in chunk.token_ids]
    assert len(tokens) == 4


async def test_a_request_without_a_worker_is_listed_without_one(
    http: httpx.AsyncClient, cluster: Cluster, served: Served
) -> None:
    mute = FakeWorker("mute")
    mute.welcomes.clear()
    await mute.start()
    cluster.workers.append(mute)
    cluster.join(mute)
    stream = served[1].generate(make_generation())
    waiting = asyncio.ensure_future(anext(stream))
    await mute.until(lambda: len(mute.hellos) == 1)
    (listed,) = (await http.get("/admin/requests")).json()["requests"]
    assert (listed["worker"], listed["pool"]) == (None, None)
    answer = await http.post("/admin/requests/r/move", json={"worker": "mute"})
    assert answer.status_code == 409
    mute.welcomes.set()
    await waiting
    await stream.aclose()


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"worker": "z"}, 404, "worker_not_found"),
        ({"worker": "a"}, 409, "cannot_move"),
        ({}, 400, None),
        ({"worker": ""}, 400, None),
        ({"worker": 3}, 400, None),
        ({"worker": "b", "force": True}, 400, None),
    ],
)
async def test_what_cannot_be_tried_says_why(
    http: httpx.AsyncClient,
    cluster: Cluster,
    served: Served,
    body: dict[str, object],
    status: int,
    code: str | None,
) -> None:
    await cluster.start(FakeWorker("a", max_answer_tokens=1))
    stream = served[1].generate(make_generation())
    await anext(stream)
    answer = await http.post("/admin/requests/r/move", json=body)
    assert answer.status_code == status
    if code is not None:
        assert answer.json()["error"]["code"] == code
    missing = await http.post("/admin/requests/x/move", json={"worker": "a"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")
    await stream.aclose()


def test_it_answers_as_the_document_says(served: Served) -> None:
    document = schemathesis.openapi.from_asgi("/openapi.json", served[0])
    assert document["/admin/requests"]["GET"].Case().call_and_validate().status_code == 200
    move = document["/admin/requests/{request_id}/move"]["POST"]
    for mode in GenerationMode:

        @settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=move.as_strategy(generation_mode=mode))
        def check(case: Case) -> None:
            case.call_and_validate()

        check()
