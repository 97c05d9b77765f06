"""The one table from our errors to what a client sees, over HTTP in OpenAI's format and over gRPC.

Errors that only HTTP knows are declared here as well:

    RequestError
    ├── RequestTimeout        408  the body did not arrive in time
    ├── BodyTooLarge          413
    ├── UnsupportedMediaType  415
    └── ClientStalled         408  it did not read its answer; it will hardly read this
"""

import math
from dataclasses import dataclass
from typing import Any

import grpc

from control_plane.errors import (
    CannotMove,
    GenerationFailed,
    GenerationTimeout,
    InvalidRequest,
    ModelNotFound,
    NoWorkers,
    PoisonRequest,
    QueueFull,
    RequestError,
    RequestNotFound,
    WorkerNotFound,
)


class RequestTimeout(RequestError):
    pass


class BodyTooLarge(RequestError):
    pass


class UnsupportedMediaType(RequestError):
    pass


class ClientStalled(RequestError):
    pass


@dataclass(frozen=True, slots=True)
class Failure:
    """`type` and `code` are OpenAI's vocabulary, where it has a word."""

    http_status: int
    grpc_status: grpc.StatusCode
    type: str
    code: str | None


FAILURES: dict[type[RequestError], Failure] = {
    InvalidRequest: Failure(400, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request_error", None),
    ModelNotFound: Failure(404, grpc.StatusCode.NOT_FOUND, "invalid_request_error", "model_not_found"),
    RequestTimeout: Failure(
        408, grpc.StatusCode.DEADLINE_EXCEEDED, "invalid_request_error", "request_timeout"
    ),
    BodyTooLarge: Failure(
        413, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request_error", "request_too_large"
    ),
    UnsupportedMediaType: Failure(
        415, grpc.StatusCode.INVALID_ARGUMENT, "invalid_request_error", "unsupported_media_type"
    ),
    ClientStalled: Failure(408, grpc.StatusCode.DEADLINE_EXCEEDED, "invalid_request_error", "client_stalled"),
    # No 5xx: clients, OpenAI's own too, send those again by themselves, and each time two more workers would die.
    PoisonRequest: Failure(
        422, grpc.StatusCode.FAILED_PRECONDITION, "invalid_request_error", "poison_request"
    ),
    QueueFull: Failure(429, grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limit_error", "queue_full"),
    GenerationFailed: Failure(500, grpc.StatusCode.INTERNAL, "server_error", "generation_failed"),
    NoWorkers: Failure(503, grpc.StatusCode.UNAVAILABLE, "server_error", "no_workers"),
    RequestNotFound: Failure(404, grpc.StatusCode.NOT_FOUND, "invalid_request_error", "request_not_found"),
    WorkerNotFound: Failure(404, grpc.StatusCode.NOT_FOUND, "invalid_request_error", "worker_not_found"),
    CannotMove: Failure(409, grpc.StatusCode.FAILED_PRECONDITION, "invalid_request_error", "cannot_move"),
    GenerationTimeout: Failure(504, grpc.StatusCode.DEADLINE_EXCEEDED, "server_error", "generation_timeout"),
}
UNEXPECTED = Failure(500, grpc.StatusCode.INTERNAL, "server_error", "internal_error")
UNEXPECTED_MESSAGE = "The server had an error while processing your request."


def failure_of(error: RequestError) -> Failure:
    for kind in type(error).__mro__:
        if kind in FAILURES:
            return FAILURES[kind]
    raise AssertionError(f"{type(error).__name__} has no row in FAILURES")


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object."""
    failure = failure_of(error)
    param, code = failure_details(error)
    return body_of(error.message, type_=failure.type, param=param, code=code)


def failure_details(error: RequestError) -> tuple[str | None, str | None]:
    """`param` and `code` of an error."""
    if isinstance(error, InvalidRequest):
        return error.param, error.code
    param = "model" if isinstance(error, ModelNotFound) else None
    return param, failure_of(error).code


def body_of(message: str, *, type_: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def retry_after_s(error: RequestError) -> int | None:
    """Whole seconds, at least one, as the Retry-After header wants them."""
    if isinstance(error, QueueFull | NoWorkers):
        return max(1, math.ceil(error.retry_after_s))
    return None
