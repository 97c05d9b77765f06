"""Reads request bodies: bounded in size and time, and strict about JSON."""

import asyncio
import json
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from control_plane.errors import InvalidRequest
from control_plane.gateway.failures import BodyTooLarge, RequestTimeout, UnsupportedMediaType
from control_plane.gateway.settings import GatewaySettings

Model = TypeVar("Model", bound=BaseModel)


async def read_request(request: Request, model: type[Model], *, settings: GatewaySettings) -> Model:
    """The body as a validated `model`. Raises the errors of `failures`, and `ClientDisconnect`."""
    body = await _read_body(request, settings=settings)
    return validate(parse_json(body), model)


async def _read_body(request: Request, *, settings: GatewaySettings) -> bytes:
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType(f"Content-Type must be application/json, got {media_type!r}.")
    limit = settings.max_body_bytes
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise BodyTooLarge(f"The request body has {declared} bytes; at most {limit} are accepted.")
    try:
        async with asyncio.timeout(settings.body_read_timeout_s):
            return await _receive_all(request, limit=limit)
    except TimeoutError as error:
        raise RequestTimeout(
            f"The request body did not arrive within {settings.body_read_timeout_s:g} s."
        ) from error


async def _receive_all(request: Request, *, limit: int) -> bytes:
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > limit:
            raise BodyTooLarge(f"The request body has more than {limit} bytes.")
        if not message.get("more_body", False):
            return bytes(body)


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object. NaN, Infinity, bytes that are no UTF-8 and anything that is no object raise `InvalidRequest`."""
    try:
        value = json.loads(body.decode("utf-8"), parse_float=_number, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The request body is not valid UTF-8 (byte {error.start}).") from error
    except RecursionError as error:
        raise InvalidRequest("The JSON body is nested too deeply.") from error
    except ValueError as error:  # malformed, or a number with thousands of digits
        raise InvalidRequest(f"We could not parse the JSON body of your request: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"The request body must be a JSON object, got {_json_type(value)}.")
    return value


def _number(text: str) -> float:
    """Whole numbers are integers however they are written, as in JSON Schema: 1.0 is a count."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def validate(value: dict[str, Any], model: type[Model]) -> Model:
    """`InvalidRequest` for the first thing that is wrong, in OpenAI's words."""
    unknown = next((name for name in value if name not in model.model_fields), None)
    if unknown is not None:
        raise _unrecognized(unknown)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _as_invalid_request(error) from error


# What would have been right for the fields that take several types; pydantic reports one error per alternative.
_ALTERNATIVES = {
    "prompt": "a non-empty string, a list of strings, a list of token ids, or a list of lists of token ids",
    "stop": "a string or a list of at most 16 non-empty strings of at most 1024 characters",
    "content": "a string or a list of content parts of type text",
    "modalities": 'null or ["text"]',
}
# Parameters OpenAI knows and this server does not support; their schemas admit only the values that change nothing.
_UNSUPPORTED = frozenset(
    {
        "audio",
        "best_of",
        "function_call",
        "functions",
        "modalities",
        "reasoning_effort",
        "response_format",
        "store",
        "suffix",
        "tool_calls",
        "tool_choice",
        "tools",
        "verbosity",
        "web_search_options",
    }
)


def _as_invalid_request(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False)[0]
    location = first["loc"]
    name = str(location[0]) if location else ""
    if first["type"] == "extra_forbidden":
        return _unrecognized(".".join(str(step) for step in location))
    param = _path_of(location)
    field = param.rpartition(".")[2]
    if name in _UNSUPPORTED or field in _UNSUPPORTED:
        param = name if name in _UNSUPPORTED else param
        return unsupported(param)
    if not param:  # a key that is no valid text
        return InvalidRequest(f"The JSON body is not valid: {first['msg']}, got {_shown(first['input'])}.")
    if first["type"] == "missing":
        return InvalidRequest(
            f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
        )
    if field in _ALTERNATIVES:
        detail = f"expected {_ALTERNATIVES[field]}"
    else:
        detail = f"{first['msg']}, got {_shown(first['input'])}"
    return InvalidRequest(f"Invalid value for '{param}': {detail}.", param=param, code="invalid_value")


def _unrecognized(path: str) -> InvalidRequest:
    return InvalidRequest(f"Unrecognized request argument supplied: {_shown(path)}", param=_shown(path))


def unsupported(param: str) -> InvalidRequest:
    return InvalidRequest(
        f"The parameter '{param}' is not supported with this value: this server generates plain text only.",
        param=param,
        code="unsupported_parameter",
    )


def _path_of(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` of a pydantic location, without the names of union branches that follow."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier():
            path += f".{step}" if path else step
            if step in _ALTERNATIVES:
                break
    return path


def _shown(value: object) -> str:
    """The offending value, short, and harmless in a log."""
    if isinstance(value, list | dict):
        return f"{_json_type(value)} of {len(value)} elements"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 64 else f"{text[:64]}… ({len(text)} characters)"


def _json_type(value: object) -> str:
    names = {
        str: "a string",
        list: "an array",
        dict: "an object",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")
