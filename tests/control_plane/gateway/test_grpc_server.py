import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from control_plane.errors import GenerationTimeout, NoWorkers, QueueFull, RequestError
from control_plane.gateway.grpc_server import ReadinessHealth, add_services
from control_plane.gateway.metrics import GatewayMetrics
from control_plane.gateway.settings import GatewaySettings
from control_plane.gateway.tenancy import Tenancy
from control_plane.gateway.tokenizer import TextTokenizer
from control_plane.generation import TokenChunk
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from tests.control_plane.gateway.conftest import ANSWER
from tests.control_plane.gateway.scripted import MODEL, WINDOW, ScriptedDispatcher, endless, worker_like

WAIT_S = 10.0


class Served:
    def __init__(self, channel: grpc.aio.Channel, health: ReadinessHealth) -> None:
        self.channel = channel
        self.health = health
        self.inference = inference_pb2_grpc.InferenceStub(channel)


@pytest.fixture
async def served(
    dispatcher: ScriptedDispatcher,
    tokenizer: TextTokenizer,
    settings: GatewaySettings,
    metrics: GatewayMetrics,
) -> AsyncIterator[Served]:
    server = grpc.aio.server()
    health = add_services(
        server, dispatcher=dispatcher, tokenizer=tokenizer, settings=settings, metrics=metrics
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Served(channel, health)
    await server.stop(None)


async def replies(served: Served, request: pb.GenerateRequest) -> list[pb.GenerateReply]:
    return [reply async for reply in served.inference.Generate(request, timeout=WAIT_S)]


async def test_messages_are_answered_as_over_http(
    served: Served, dispatcher: ScriptedDispatcher, tokenizer: TextTokenizer
) -> None:
    dispatcher.script = worker_like(tokenizer, ANSWER, num_cached_tokens=16)
    messages = pb.Messages(messages=[pb.Message(role="user", content="hi")])
    got = await replies(served, pb.GenerateRequest(model=MODEL, messages=messages, request_id="mine"))
    assert "".join(reply.text for reply in got) == ANSWER
    assert [reply.finish_reason for reply in got] == [""] * (len(got) - 1) + ["stop"]
    assert {reply.request_id for reply in got} == {"mine"}
    token_ids = [token_id for reply in got for token_id in reply.token_ids]
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == ANSWER
    assert got[-1].usage.completion_tokens == len(token_ids)
    assert got[-1].usage.prompt_tokens == len(dispatcher.generations[0].prompt_token_ids)
    assert got[-1].usage.cached_tokens == 16
    prompt = tokenizer.decode(dispatcher.generations[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt == "<bos><user>hi<end><assistant>"


async def test_sampling_fields_reach_the_dispatcher(served: Served, dispatcher: ScriptedDispatcher) -> None:
    request = pb.GenerateRequest(
        model=MODEL,
        prompt_token_ids=pb.TokenIds(token_ids=[3, 4]),
        max_tokens=20,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        seed=2**64 - 1,
        stop=["zz"],
        stop_token_ids=[9],
        min_tokens=1,
        ignore_eos=True,
        priority=-2,
        deadline_s=30.0,
        cache_salt="s",
    )
    await replies(served, request)
    generation = dispatcher.generations[0]
    sampling = generation.sampling
    assert (generation.prompt_token_ids, generation.priority, generation.cache_salt) == ([3, 4], -2, "s")
    assert generation.deadline_unix_s == pytest.approx(time.time() + 30.0, abs=WAIT_S)
    assert (sampling.max_tokens, sampling.min_tokens, sampling.seed) == (20, 1, 2**64 - 1)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 7, 0.125)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (
        1.5,
        -0.5,
        0.5,
    )
    assert (sampling.stop_strings, sampling.stop_token_ids, sampling.ignore_eos) == (("zz",), (9,), True)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (pb.GenerateRequest(model=MODEL), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(model=MODEL, prompt=""), grpc.StatusCode.INVALID_ARGUMENT),
        (
            pb.GenerateRequest(model=MODEL, prompt="x", temperature=float("nan")),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (pb.GenerateRequest(model=MODEL, prompt="x", max_tokens=WINDOW), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(model=MODEL, prompt="x", stop=["s"] * 10_000), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(model="other", prompt="x"), grpc.StatusCode.NOT_FOUND),
    ],
)
async def test_bad_requests_have_their_status(
    served: Served, request_: pb.GenerateRequest, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await replies(served, request_)
    assert caught.value.code() is code
    assert caught.value.details()


@pytest.mark.parametrize(
    ("error", "code", "retry_after"),
    [
        (QueueFull("full", retry_after_s=2.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "3"),
        (NoWorkers("none", retry_after_s=1), grpc.StatusCode.UNAVAILABLE, "1"),
        (GenerationTimeout("slow"), grpc.StatusCode.DEADLINE_EXCEEDED, None),
    ],
)
async def test_failures_have_their_status_also_after_the_first_token(
    served: Served,
    dispatcher: ScriptedDispatcher,
    error: RequestError,
    code: grpc.StatusCode,
    retry_after: str | None,
) -> None:
    dispatcher.script = lambda generation: [TokenChunk(token_ids=(40,)), error]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await replies(served, pb.GenerateRequest(model=MODEL, prompt="x"))
    assert (caught.value.code(), caught.value.details()) == (code, error.message)
    trailing = caught.value.trailing_metadata()
    assert (dict(trailing or ())).get("retry-after-s") == retry_after


async def test_a_cancelled_call_aborts_its_request(served: Served, dispatcher: ScriptedDispatcher) -> None:
    dispatcher.script = endless(40, pause=asyncio.Event())
    call = served.inference.Generate(pb.GenerateRequest(model=MODEL, prompt="x"), timeout=WAIT_S)
    await call.read()
    call.cancel()
    async with asyncio.timeout(WAIT_S):
        await dispatcher.closed.wait()
    assert len(dispatcher.aborted) == 1


class TestSlowReader:
    @pytest.fixture
    def settings(self, model_path: Path) -> GatewaySettings:
        return GatewaySettings(model_path=model_path, max_body_bytes=1024, stream_write_timeout_s=0.2)

    async def test_a_client_that_stops_reading_loses_its_request(
        self, served: Served, dispatcher: ScriptedDispatcher
    ) -> None:
        dispatcher.script = endless(40)
        call = served.inference.Generate(pb.GenerateRequest(model=MODEL, prompt="x"), timeout=WAIT_S)
        await call.read()
        async with asyncio.timeout(WAIT_S):
            await dispatcher.closed.wait()
        assert len(dispatcher.aborted) == 1
        call.cancel()


async def test_lists_the_models(served: Served) -> None:
    reply = await served.inference.ListModels(pb.ListModelsRequest(), timeout=WAIT_S)
    assert [(model.id, model.max_model_len) for model in reply.models] == [(MODEL, WINDOW)]


async def test_health_follows_the_dispatcher_for_checks_and_watches(
    served: Served, dispatcher: ScriptedDispatcher
) -> None:
    stub = health_pb2_grpc.HealthStub(served.channel)
    names = health_pb2.HealthCheckResponse
    following = asyncio.create_task(served.health.follow(interval_s=0.01))
    for service in ("", "penstock.inference.v1.Inference"):
        dispatcher.is_ready = True
        request = health_pb2.HealthCheckRequest(service=service)
        assert (await stub.Check(request, timeout=WAIT_S)).status == names.SERVING
        watch = stub.Watch(request, timeout=WAIT_S)
        assert (await watch.read()).status == names.SERVING
        dispatcher.is_ready = False
        assert (await watch.read()).status == names.NOT_SERVING
        assert (await stub.Check(request, timeout=WAIT_S)).status == names.NOT_SERVING
        watch.cancel()
    following.cancel()
    await asyncio.wait((following,))


async def test_reflection_lists_the_services(served: Served) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo(iter([request]), timeout=WAIT_S)
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {"penstock.inference.v1.Inference", "grpc.health.v1.Health"} <= names
    call.cancel()


class TestWithTenants:
    @pytest.fixture
    def settings(self, settings: GatewaySettings) -> GatewaySettings:
        return replace(settings, tenancy=Tenancy(header="X-Tenant", weights={"gold": 3.0}))

    async def test_the_tenant_is_named_in_the_metadata(
        self, served: Served, dispatcher: ScriptedDispatcher
    ) -> None:
        request = pb.GenerateRequest(model=MODEL, prompt="x", max_tokens=1)
        call = served.inference.Generate(request, timeout=WAIT_S, metadata=(("x-tenant", "gold"),))
        assert [reply async for reply in call]
        (generation,) = dispatcher.generations
        assert (generation.tenant, generation.tenant_weight) == ("gold", 3.0)
