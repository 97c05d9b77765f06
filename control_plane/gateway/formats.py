"""The two shapes of an answer, OpenAI's chat and text completions, whole or as server-sent events.

A stream writes thousands of almost equal events, so all that does not change within a request is encoded once.
"""

import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as encode_text
from typing import Any, Protocol

from control_plane.gateway.choices import Delta, TokenText
from control_plane.gateway.intake import Job
from control_plane.gateway.tokenizer import TextTokenizer

_LOWEST_LOGPROB = -9999.0  # JSON has no -Infinity; OpenAI writes this
DONE_EVENT = b"data: [DONE]\n\n"


class AnswerFormat(Protocol):
    """How one request's answer is written."""

    def opening_events(self) -> bytes:
        """What a stream begins with."""
        ...

    def event(self, delta: Delta) -> bytes:
        """The server-sent event for a delta; empty if there is nothing to tell."""
        ...

    def usage_event(self, usage: dict[str, Any]) -> bytes: ...

    def body(self, deltas: Sequence[Delta], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        ...


class ChatFormat:
    """`chat.completion` and its chunks."""

    def __init__(self, job: Job, *, tokenizer: TextTokenizer, created_unix_s: int) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._created_unix_s = created_unix_s
        self._head = _event_head(self._frame("chat.completion.chunk"), include_usage=job.include_usage)

    def opening_events(self) -> bytes:
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        return "".join(
            f'{self._head}"choices":[{{"index":{i},{delta}' for i in range(len(self._job.generations))
        ).encode()

    def event(self, delta: Delta) -> bytes:
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return b""
        content = f'"content":{encode_text(delta.text)}' if delta.text else ""
        logprobs = json.dumps(self._logprobs(delta.logprobs)) if delta.logprobs else "null"
        finish = f'"{delta.finish_reason.value}"' if delta.finish_reason else "null"
        return (
            f'{self._head}"choices":[{{"index":{delta.index},"delta":{{{content}}},"logprobs":{logprobs},'
            f'"finish_reason":{finish}}}]}}\n\n'
        ).encode()

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        return _usage_event(self._frame("chat.completion.chunk"), usage)

    def body(self, deltas: Sequence[Delta], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [self._choice(index, each) for index, each in enumerate(_by_choice(deltas, self._job))]
        return {**self._frame("chat.completion"), "choices": choices, "usage": usage}

    def _choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        with_logprobs = self._job.generations[index].sampling.num_logprobs is not None
        tokens = [token for delta in deltas for token in delta.logprobs]
        return {
            "index": index,
            "message": {
                "role": "assistant",
                "content": "".join(delta.text for delta in deltas),
                "refusal": None,
            },
            "logprobs": self._logprobs(tokens) if with_logprobs else None,
            "finish_reason": _finish_reason(deltas),
        }

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        return {"content": [self._token_entry(token) for token in tokens], "refusal": None}

    def _token_entry(self, token: TokenText) -> dict[str, Any]:
        top = [self._entry(token_id, logprob) for token_id, logprob in token.logprobs.top]
        return {**self._entry(token.token_id, token.logprobs.logprob), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}

    def _frame(self, object_: str) -> dict[str, Any]:
        return _frame(self._job, object_, self._created_unix_s)


class TextFormat:
    """`text_completion`, whose stream has the same shape."""

    def __init__(self, job: Job, *, tokenizer: TextTokenizer, created_unix_s: int) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._created_unix_s = created_unix_s
        self._head = _event_head(self._frame(), include_usage=job.include_usage)

    def opening_events(self) -> bytes:
        return "".join(
            f'{self._head}"choices":[{{"index":{i},"text":{encode_text(echo)},"logprobs":null,'
            '"finish_reason":null}]}\n\n'
            for i, echo in enumerate(self._job.echoes)
            if echo
        ).encode()

    def event(self, delta: Delta) -> bytes:
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return b""
        logprobs = json.dumps(self._logprobs(delta.logprobs)) if delta.logprobs else "null"
        finish = f'"{delta.finish_reason.value}"' if delta.finish_reason else "null"
        return (
            f'{self._head}"choices":[{{"index":{delta.index},"text":{encode_text(delta.text)},"logprobs":{logprobs},'
            f'"finish_reason":{finish}}}]}}\n\n'
        ).encode()

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        return _usage_event(self._frame(), usage)

    def body(self, deltas: Sequence[Delta], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [self._choice(index, each) for index, each in enumerate(_by_choice(deltas, self._job))]
        return {**self._frame(), "choices": choices, "usage": usage}

    def _choice(self, index: int, deltas: Sequence[Delta]) -> dict[str, Any]:
        with_logprobs = self._job.generations[index].sampling.num_logprobs is not None
        tokens = [token for delta in deltas for token in delta.logprobs]
        return {
            "index": index,
            "text": self._job.echoes[index] + "".join(delta.text for delta in deltas),
            "logprobs": self._logprobs(tokens) if with_logprobs else None,
            "finish_reason": _finish_reason(deltas),
        }

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        return {
            "tokens": [self._name(token.token_id) for token in tokens],
            "token_logprobs": [_finite(token.logprobs.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: TokenText) -> dict[str, float]:
        """The most likely tokens, and the chosen one whatever its rank."""
        candidates = [*token.logprobs.top, (token.token_id, token.logprobs.logprob)]
        return {self._name(token_id): _finite(logprob) for token_id, logprob in candidates}

    def _name(self, token_id: int) -> str:
        """The token's text; a token that is no whole character is written as its bytes, so that names stay distinct."""
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _frame(self) -> dict[str, Any]:
        return _frame(self._job, "text_completion", self._created_unix_s)


def error_event(body: dict[str, Any]) -> bytes:
    """An error after the stream has begun."""
    return f"data: {json.dumps(body)}\n\n".encode()


def _frame(job: Job, object_: str, created_unix_s: int) -> dict[str, Any]:
    return {"id": job.id, "object": object_, "created": created_unix_s, "model": job.model}


def _event_head(frame: dict[str, Any], *, include_usage: bool) -> str:
    # With include_usage, every event has a usage field, null in all but the last.
    head = frame | {"usage": None} if include_usage else frame
    return f"data: {json.dumps(head, separators=(',', ':'))[:-1]},"


def _usage_event(frame: dict[str, Any], usage: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(frame | {'choices': [], 'usage': usage}, separators=(',', ':'))}\n\n".encode()


def _by_choice(deltas: Sequence[Delta], job: Job) -> list[list[Delta]]:
    grouped: list[list[Delta]] = [[] for _ in job.generations]
    for delta in deltas:
        grouped[delta.index].append(delta)
    return grouped


def _finish_reason(deltas: Sequence[Delta]) -> str:
    reason = deltas[-1].finish_reason
    assert reason is not None, "an answer is written when all its choices have finished"
    return reason.value


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
