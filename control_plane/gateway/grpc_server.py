"""The public gRPC API, over the same intake and the same answers as HTTP, with reflection and health."""

import asyncio
import secrets
from contextlib import aclosing
from typing import Any, NoReturn, cast

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer as AioHealthServicer
from grpc_reflection.v1alpha import reflection

from control_plane.errors import InvalidRequest, RequestError
from control_plane.gateway.backend import Dispatcher
from control_plane.gateway.body import validate
from control_plane.gateway.chat_template import load_chat_template
from control_plane.gateway.choices import answer
from control_plane.gateway.failures import ClientStalled, failure_of, retry_after_s
from control_plane.gateway.intake import Intake, Job
from control_plane.gateway.metrics import GatewayMetrics
from control_plane.gateway.schema import ChatCompletionRequest, CompletionRequest
from control_plane.gateway.settings import GatewaySettings
from control_plane.gateway.timeline import RequestTimeline
from control_plane.gateway.tokenizer import TextTokenizer
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc

_SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_OPTIONAL_FIELDS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "deadline_s",
)


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Requests become the bodies that HTTP clients would send, so both are checked and served alike."""

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        tokenizer: TextTokenizer,
        intake: Intake,
        metrics: GatewayMetrics,
        settings: GatewaySettings,
    ) -> None:
        self._dispatcher = dispatcher
        self._tokenizer = tokenizer
        self._intake = intake
        self._metrics = metrics
        self._write_timeout_s = settings.stream_write_timeout_s
        self._tenancy = settings.tenancy

    async def Generate(  # type: ignore[override]  # the stubs know only generators; `write` can time out
        self,
        request: pb.GenerateRequest,
        context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateReply],
    ) -> None:
        request_id = request.request_id or f"req-{secrets.token_hex(16)}"
        timeline = RequestTimeline(
            self._metrics, protocol="grpc", operation="Generate", request_id=request_id
        )
        code = grpc.StatusCode.CANCELLED  # unless we get further
        try:
            tenant = self._tenancy.tenant_of(_metadata(context))
            job = (await self._accept(request)).of(tenant)
            timeline.accepted(job)
            with self._metrics.open_streams.track_inprogress():
                await self._answer(job, timeline, context)
            code = grpc.StatusCode.OK
        except RequestError as error:
            timeline.failed(error.message)
            code = failure_of(error).grpc_status
            await _abort(context, error)
        except Exception as error:
            timeline.failed(repr(error))
            code = grpc.StatusCode.UNKNOWN
            raise
        finally:
            timeline.closed(code.name)

    async def _accept(self, request: pb.GenerateRequest) -> Job:
        job_id = f"gen-{secrets.token_hex(16)}"
        fields = _fields(request)
        match request.WhichOneof("input"):
            case "messages":
                messages = [
                    {"role": each.role, "content": each.content} for each in request.messages.messages
                ]
                chat = validate({**fields, "messages": messages}, ChatCompletionRequest)
                return await self._intake.chat(chat, job_id=job_id)
            case "prompt":
                body = validate({**fields, "prompt": request.prompt}, CompletionRequest)
            case "prompt_token_ids":
                token_ids = list(request.prompt_token_ids.token_ids)
                body = validate({**fields, "prompt": token_ids}, CompletionRequest)
            case None:
                raise InvalidRequest("Give one of prompt, messages and prompt_token_ids.", param="input")
        return await self._intake.completion(body, job_id=job_id)

    async def _answer(
        self, job: Job, timeline: RequestTimeline, context: grpc.aio.ServicerContext[Any, pb.GenerateReply]
    ) -> None:
        deltas = answer(job, dispatcher=self._dispatcher, tokenizer=self._tokenizer)
        async with aclosing(deltas):
            async for delta in deltas:
                timeline.tokens(delta)
                reply = pb.GenerateReply(
                    request_id=timeline.request_id, text=delta.text, token_ids=delta.token_ids
                )
                if delta.finish_reason is not None:
                    usage = timeline.usage()
                    reply.finish_reason = delta.finish_reason.value
                    reply.usage.prompt_tokens = usage["prompt_tokens"]
                    reply.usage.completion_tokens = usage["completion_tokens"]
                    reply.usage.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
                try:
                    async with asyncio.timeout(self._write_timeout_s):
                        await context.write(reply)
                except TimeoutError as error:
                    raise ClientStalled(
                        f"The client read nothing for {self._write_timeout_s:g} s."
                    ) from error

    async def ListModels(
        self,
        request: pb.ListModelsRequest,
        context: grpc.aio.ServicerContext[pb.ListModelsRequest, pb.ListModelsReply],
    ) -> pb.ListModelsReply:
        models = self._dispatcher.models()
        return pb.ListModelsReply(
            models=[pb.Model(id=model.name, max_model_len=model.max_model_len) for model in models]
        )


class ReadinessHealth(AioHealthServicer):  # type: ignore[misc]  # untyped
    """The standard health service; SERVING means that the dispatcher is ready."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__()
        self._dispatcher = dispatcher
        self._was_ready: bool | None = None

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:
        await self.refresh()
        return await super().Check(request, context)

    async def follow(self, *, interval_s: float) -> NoReturn:
        """Keeps watchers informed, until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(interval_s)

    async def refresh(self) -> None:
        is_ready = self._dispatcher.ready()
        if is_ready == self._was_ready:  # to tell watchers of no change could block on a slow one
            return
        self._was_ready = is_ready
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if is_ready else statuses.NOT_SERVING
        for service in ("", _SERVICE):
            await self.set(service, status)


def add_services(
    server: grpc.aio.Server,
    *,
    dispatcher: Dispatcher,
    tokenizer: TextTokenizer,
    settings: GatewaySettings,
    metrics: GatewayMetrics,
) -> ReadinessHealth:
    """Inference, health and reflection. The caller runs the returned servicer's `follow` for as long as the server."""
    intake = Intake(
        dispatcher=dispatcher,
        tokenizer=tokenizer,
        chat_template=load_chat_template(settings.model_path),
        settings=settings,
    )
    servicer = InferenceServicer(
        dispatcher=dispatcher,
        tokenizer=tokenizer,
        intake=intake,
        metrics=metrics,
        settings=settings,
    )
    health_servicer = ReadinessHealth(dispatcher)
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return health_servicer


def _metadata(context: grpc.aio.ServicerContext[Any, Any]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in context.invocation_metadata() or () if isinstance(value, str)]


def _fields(request: pb.GenerateRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {
        name: getattr(request, name) for name in _OPTIONAL_FIELDS if request.HasField(cast(Any, name))
    }
    return fields | {
        "model": request.model,
        "stop": list(request.stop),
        "stop_token_ids": list(request.stop_token_ids),
        "min_tokens": request.min_tokens,
        "ignore_eos": request.ignore_eos,
        "priority": request.priority,
        "cache_salt": request.cache_salt,
    }


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: RequestError) -> NoReturn:
    seconds = retry_after_s(error)
    metadata = () if seconds is None else (("retry-after-s", str(seconds)),)
    await context.abort(failure_of(error).grpc_status, error.message, metadata)
    raise AssertionError("abort raises")
