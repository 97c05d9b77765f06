"""The OpenAI-compatible HTTP API."""

import secrets
import time
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from control_plane.errors import RequestError
from control_plane.gateway import replies
from control_plane.gateway.backend import Dispatcher, ServedModel
from control_plane.gateway.body import read_request
from control_plane.gateway.chat_template import load_chat_template
from control_plane.gateway.choices import answer
from control_plane.gateway.failures import (
    UNEXPECTED,
    UNEXPECTED_MESSAGE,
    body_of,
    error_body,
    failure_of,
    retry_after_s,
)
from control_plane.gateway.formats import AnswerFormat, ChatFormat, TextFormat
from control_plane.gateway.intake import Intake, Job
from control_plane.gateway.metrics import METRICS_MEDIA_TYPE, GatewayMetrics
from control_plane.gateway.middleware import RequestScope
from control_plane.gateway.openapi import (
    ERRORS,
    GENERATION_ERRORS,
    MODEL_ERRORS,
    Responses,
    describe_request_bodies,
    json_reply,
    request_body,
    stream_or,
    text_reply,
)
from control_plane.gateway.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from control_plane.gateway.settings import GatewaySettings
from control_plane.gateway.stream import AnswerResponse
from control_plane.gateway.timeline import RequestTimeline
from control_plane.gateway.tokenizer import TextTokenizer
from control_plane.version import penstock_version


def create_app(
    *, dispatcher: Dispatcher, tokenizer: TextTokenizer, settings: GatewaySettings, metrics: GatewayMetrics
) -> FastAPI:
    """`ValueError` if the model's chat template is no valid Jinja."""
    app = FastAPI(
        title="Penstock", version=penstock_version(), docs_url=None, redoc_url=None, redirect_slashes=False
    )
    intake = Intake(
        dispatcher=dispatcher,
        tokenizer=tokenizer,
        chat_template=load_chat_template(settings.model_path),
        settings=settings,
    )
    endpoints = _Endpoints(dispatcher, tokenizer=tokenizer, settings=settings, metrics=metrics, intake=intake)
    app.include_router(_router(endpoints))
    app.add_middleware(RequestScope, metrics=metrics)
    app.add_exception_handler(RequestError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(Exception, _apologise)
    describe_request_bodies(app)
    return app


class _Endpoints:
    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        tokenizer: TextTokenizer,
        settings: GatewaySettings,
        metrics: GatewayMetrics,
        intake: Intake,
    ) -> None:
        self._dispatcher = dispatcher
        self._tokenizer = tokenizer
        self._settings = settings
        self._metrics = metrics
        self._intake = intake
        self._started_unix_s = int(time.time())

    async def chat_completions(self, request: Request) -> Response:
        tenant = self._settings.tenancy.tenant_of(request.headers.items())
        body = await read_request(request, ChatCompletionRequest, settings=self._settings)
        job = (await self._intake.chat(body, job_id=f"chatcmpl-{secrets.token_hex(16)}")).of(tenant)
        return self._answer(
            request, job, ChatFormat(job, tokenizer=self._tokenizer, created_unix_s=int(time.time()))
        )

    async def completions(self, request: Request) -> Response:
        tenant = self._settings.tenancy.tenant_of(request.headers.items())
        body = await read_request(request, CompletionRequest, settings=self._settings)
        job = (await self._intake.completion(body, job_id=f"cmpl-{secrets.token_hex(16)}")).of(tenant)
        return self._answer(
            request, job, TextFormat(job, tokenizer=self._tokenizer, created_unix_s=int(time.time()))
        )

    def _answer(self, request: Request, job: Job, format_: AnswerFormat) -> Response:
        timeline: RequestTimeline = request.state.timeline
        timeline.accepted(job)
        return AnswerResponse(
            job,
            deltas=answer(job, dispatcher=self._dispatcher, tokenizer=self._tokenizer),
            format_=format_,
            timeline=timeline,
            metrics=self._metrics,
            write_timeout_s=self._settings.stream_write_timeout_s,
        )

    async def models(self) -> Response:
        cards = [self._card(model) for model in self._dispatcher.models()]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, name: str) -> Response:
        return JSONResponse(self._card(self._intake.served_model(name)))

    def _card(self, model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._started_unix_s,
            "owned_by": "penstock",
            "max_model_len": model.max_model_len,
        }

    async def tokenize(self, request: Request) -> Response:
        body = await read_request(request, TokenizeRequest, settings=self._settings)
        tokens, max_model_len = await self._intake.tokenize(body)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": max_model_len})

    async def detokenize(self, request: Request) -> Response:
        body = await read_request(request, DetokenizeRequest, settings=self._settings)
        return JSONResponse({"prompt": await self._intake.detokenize(body)})

    async def health(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        is_ready = self._dispatcher.ready()
        return JSONResponse(
            {"status": "ready" if is_ready else "not ready"}, status_code=200 if is_ready else 503
        )

    async def version(self) -> Response:
        return JSONResponse({"version": penstock_version()})

    async def metrics(self) -> Response:
        return Response(self._metrics.render(), media_type=METRICS_MEDIA_TYPE)


def _router(endpoints: _Endpoints) -> APIRouter:
    router = APIRouter()
    router.add_api_route(
        "/v1/chat/completions",
        endpoints.chat_completions,
        methods=["POST"],
        responses=stream_or(replies.ChatCompletion) | GENERATION_ERRORS,
        openapi_extra=request_body(ChatCompletionRequest),
    )
    router.add_api_route(
        "/v1/completions",
        endpoints.completions,
        methods=["POST"],
        responses=stream_or(replies.TextCompletion) | GENERATION_ERRORS,
        openapi_extra=request_body(CompletionRequest),
    )
    router.add_api_route(
        "/tokenize",
        endpoints.tokenize,
        methods=["POST"],
        responses=json_reply(replies.TokenizeReply) | ERRORS,
        openapi_extra=request_body(TokenizeRequest),
    )
    router.add_api_route(
        "/detokenize",
        endpoints.detokenize,
        methods=["POST"],
        responses=json_reply(replies.DetokenizeReply) | ERRORS,
        openapi_extra=request_body(DetokenizeRequest),
    )
    router.add_api_route("/v1/models", endpoints.models, responses=json_reply(replies.ModelList))
    router.add_api_route(
        "/v1/models/{name:path}", endpoints.model, responses=json_reply(replies.ModelCard) | MODEL_ERRORS
    )
    status = json_reply(replies.StatusReply)
    router.add_api_route("/health", endpoints.health, responses=status)
    not_ready: Responses = {503: status[200]}
    router.add_api_route("/ready", endpoints.ready, responses=status | not_ready)
    router.add_api_route("/version", endpoints.version, responses=json_reply(replies.VersionReply))
    router.add_api_route("/metrics", endpoints.metrics, responses={200: text_reply(METRICS_MEDIA_TYPE)})
    return router


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError), "registered for RequestError"
    request.state.timeline.failed(error.message)
    seconds = retry_after_s(error)
    headers = {} if seconds is None else {"Retry-After": str(seconds)}
    return JSONResponse(error_body(error), status_code=failure_of(error).http_status, headers=headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, which the router finds."""
    assert isinstance(error, HTTPException), "registered for HTTPException"
    message = f"{error.detail}: {request.method} {request.url.path}"
    return JSONResponse(
        body_of(message, type_="invalid_request_error"), status_code=error.status_code, headers=error.headers
    )


async def _apologise(request: Request, error: Exception) -> Response:
    """Our own bugs. The server re-raises `error` and logs it; the client learns nothing of our insides."""
    body = body_of(UNEXPECTED_MESSAGE, type_=UNEXPECTED.type, code=UNEXPECTED.code)
    headers = {"X-Request-Id": request.state.timeline.request_id}  # this handler is outside of the middleware
    return JSONResponse(body, status_code=UNEXPECTED.http_status, headers=headers)
