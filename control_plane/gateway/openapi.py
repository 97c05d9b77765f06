"""What the OpenAPI document says beyond what FastAPI finds out: bodies that are read by hand, streams and errors."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from control_plane.gateway import replies
from control_plane.gateway.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

Responses = dict[int | str, dict[str, Any]]

_BODIES: tuple[type[BaseModel], ...] = (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
_REFERENCE = "#/components/schemas/{model}"
_RETRY_AFTER = {
    "Retry-After": {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}, "required": True}
}
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk, an error, or [DONE] as the last"}},
    "required": ["data"],
}


def _error(description: str) -> dict[str, Any]:
    return {"model": replies.ErrorReply, "description": description}


ERRORS: Responses = {
    400: _error("The request is not valid"),
    404: _error("The model does not exist"),
    408: _error("The body did not arrive in time"),
    413: _error("The body is too large"),
    415: _error("The body is not application/json"),
    503: _error("No worker serves a model") | {"headers": _RETRY_AFTER},
}
MODEL_ERRORS: Responses = {code: ERRORS[code] for code in (404, 503)}
GENERATION_ERRORS: Responses = ERRORS | {
    422: _error("Two workers died of the request"),
    429: _error("The queue is full") | {"headers": _RETRY_AFTER},
    500: _error("The generation failed"),
    504: _error("The generation made no progress"),
}


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def json_reply(model: type[BaseModel]) -> Responses:
    return {200: {"model": model}}


def stream_or(model: type[BaseModel]) -> Responses:
    """A whole answer, or events if the request asks for a stream."""
    return {200: {"model": model, "content": {"text/event-stream": {"itemSchema": _EVENT}}}}


def text_reply(media_type: str) -> dict[str, Any]:
    return {"content": {media_type: {"schema": {"type": "string"}}}}


def describe_request_bodies(app: FastAPI) -> None:
    """Adds the schemas that `request_body` refers to, once, when the document is first asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, definitions = models_json_schema(
                [(model, "validation") for model in _BODIES], ref_template=_REFERENCE
            )
            app.openapi_schema["components"]["schemas"] |= definitions["$defs"]
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way
