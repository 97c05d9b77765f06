"""A client of /v1/chat/completions that streams: HTTP and server-sent events, and their failures in plain words."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypedDict

import httpx

from control_plane.cli.failures import CommandFailed

_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 300.0  # between two events; the gateway has deadlines of its own


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


class ChatClient:
    """Raises CommandFailed for everything a gateway or the way to it can do wrong."""

    def __init__(self, url: str, *, model: str | None, settings: Mapping[str, object]) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._settings = settings
        timeout = httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        try:
            self._http = httpx.Client(base_url=self.url, timeout=timeout)
        except httpx.InvalidURL as e:
            raise CommandFailed(f"{self.url!r} is not a URL: {e}") from e
        self.last_usage: Usage | None = None
        self.last_finish_reason: str | None = None
        self.model = model or self._first_model()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def stream(self, messages: list[Message]) -> Iterator[str]:
        """The pieces of the answer as they arrive. Leaving the loop early disconnects, which ends the generation."""
        self.last_usage = self.last_finish_reason = None
        body = {
            "model": self.model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._settings,
        }
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise CommandFailed(_reason(response))
                for line in response.iter_lines():
                    if line.startswith("data:"):
                        text = self._take_in(line.removeprefix("data:").strip())
                        if text:
                            yield text
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e

    def _take_in(self, data: str) -> str:
        if data == "[DONE]":
            return ""
        event = json.loads(data)
        if "error" in event:
            raise CommandFailed(f"the answer broke off: {event['error'].get('message', event['error'])}")
        if usage := event.get("usage"):
            self.last_usage = _usage(usage)
        for choice in event.get("choices", ()):
            self.last_finish_reason = choice.get("finish_reason") or self.last_finish_reason
            return choice.get("delta", {}).get("content") or ""
        return ""

    def _first_model(self) -> str:
        try:
            response = self._http.get("/v1/models")
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e
        if response.is_error:
            raise CommandFailed(_reason(response))
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError) as e:
            raise CommandFailed(f"{self.url} serves no model yet") from e

    def _unreachable(self, error: httpx.HTTPError) -> CommandFailed:
        return CommandFailed(f"{self.url} does not answer: {error or type(error).__name__}")


def _usage(raw: Mapping[str, Any]) -> Usage:
    return Usage(
        num_prompt_tokens=raw["prompt_tokens"],
        num_cached_tokens=(raw.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        num_output_tokens=raw["completion_tokens"],
    )


def _reason(response: httpx.Response) -> str:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text.strip()[:200] or response.reason_phrase
    return f"{response.status_code} from {response.request.url}: {message}"
