import json
from typing import Any

import httpx
import pytest

from control_plane.errors import GenerationFailed, GenerationTimeout, NoWorkers, QueueFull, RequestError
from control_plane.gateway.settings import GatewaySettings
from control_plane.gateway.tokenizer import TextTokenizer
from tests.control_plane.gateway.scripted import MODEL, WINDOW, ScriptedDispatcher

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = [{"role": "user", "content": "x"}]


async def refused(http: httpx.AsyncClient, path: str, body: Any, *, status: int = 400) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"model": "demo",}', b"[1, 2]", b"null", b'"x"', b"[" * 100_000]
)
async def test_what_is_no_json_object_is_refused(http: httpx.AsyncClient, body: bytes) -> None:
    assert (await refused(http, CHAT, body))["type"] == "invalid_request_error"


async def test_bytes_that_are_no_utf8_are_refused(http: httpx.AsyncClient) -> None:
    error = await refused(http, TEXT, b'{"model": "demo", "prompt": "\xff\xfe"}')
    assert "UTF-8" in error["message"]


async def test_a_lone_surrogate_is_refused(http: httpx.AsyncClient) -> None:
    assert (await refused(http, TEXT, b'{"model": "demo", "prompt": "\\ud800"}'))["param"] == "prompt"
    key = await refused(http, TEXT, b'{"model": "demo", "prompt": "x", "\\ud800": 1}')
    assert "\\ud800" in key["message"]


@pytest.mark.parametrize("half", ["\\ud800", "\\udc00", "\\udc00\\ud800"])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TEXT, '{"model": "HALF", "prompt": "x"}', "model"),
        (TEXT, '{"model": "demo", "prompt": ["x", "HALF"]}', "prompt"),
        (TEXT, '{"model": "demo", "prompt": "x", "stop": ["HALF"]}', "stop"),
        (TEXT, '{"model": "demo", "prompt": "x", "cache_salt": "HALF"}', "cache_salt"),
        (CHAT, '{"model": "demo", "messages": [{"role": "user", "content": "HALF"}]}', "messages[0].content"),
        (
            CHAT,
            '{"model": "demo", "messages": [{"role": "user", "content": [{"type": "text", "text": "HALF"}]}]}',
            "messages[0].content",
        ),
        (
            CHAT,
            '{"model": "demo", "messages": [{"role": "user", "content": "x", "name": "HALF"}]}',
            "messages[0].name",
        ),
        ("/tokenize", '{"prompt": "HALF"}', "prompt"),
        ("/tokenize", '{"model": "HALF", "prompt": "x"}', "model"),
    ],
)
async def test_half_a_surrogate_pair_is_refused_in_every_field(
    http: httpx.AsyncClient, path: str, body: str, param: str, half: str
) -> None:
    assert (await refused(http, path, body.replace("HALF", half).encode()))["param"] == param


@pytest.mark.parametrize(
    "number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0.1", b"2.1", b'"0.5"', b"true", b"[]"]
)
async def test_temperatures_that_are_no_number_from_0_to_2_are_refused(
    http: httpx.AsyncClient, number: bytes
) -> None:
    error = await refused(http, TEXT, b'{"model": "demo", "prompt": "x", "temperature": ' + number + b"}")
    assert error["param"] in ("temperature", None)
    assert "temperature" in error["message"] or "JSON" in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", -0.1),
        ("n", 0),
        ("n", 17),
        ("n", 1.5),
        ("n", 1e300),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", "16"),
        ("max_tokens", 2**40),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("seed", 2**64),
        ("seed", 0.5),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"99999": 1}),
        ("logit_bias", [1]),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("stop_token_ids", [99999]),
        ("stop_token_ids", [-1]),
        ("stop", ""),
        ("stop", [""]),
        ("stop", 5),
        ("stop", "x" * 1025),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("priority", 2**31),
        ("echo", 1),
        ("logprobs", 6),
        ("logprobs", True),
        ("model", 5),
        ("model", None),
        ("user", 5),
        ("cache_salt", "x" * 257),
    ],
)
async def test_a_value_out_of_range_or_of_the_wrong_type_is_refused_by_name(
    http: httpx.AsyncClient, field: str, value: object
) -> None:
    error = await refused(http, TEXT, {"model": MODEL, "prompt": "x", field: value})
    assert error["param"].startswith(field)
    assert field in error["message"]


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [""],
        [[]],
        [-1],
        [2**31],
        [1.5],
        ["a", 1],
        [[1], "a"],
        5,
        {},
        None,
        [True],
        [99999],
        [[3], [99999]],
    ],
)
async def test_prompts_that_are_empty_or_no_text_nor_token_ids_are_refused(
    http: httpx.AsyncClient, prompt: object
) -> None:
    assert (await refused(http, TEXT, {"model": MODEL, "prompt": prompt}))["param"] == "prompt"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        [5],
        [{"role": "user"}],
        [{"role": "robot", "content": "x"}],
        [{"role": "tool", "content": "x"}],
        [{"content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
        [{"role": "user", "content": [{"type": "input_audio"}]}],
        [{"role": "user", "content": "x", "mood": "good"}],
    ],
)
async def test_messages_that_cannot_be_rendered_are_refused(
    http: httpx.AsyncClient, messages: object
) -> None:
    error = await refused(http, CHAT, {"model": MODEL, "messages": messages})
    assert error["param"].startswith("messages")


async def test_an_image_is_refused_with_what_would_be_right(http: httpx.AsyncClient) -> None:
    content = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    error = await refused(http, CHAT, {"model": MODEL, "messages": [{"role": "user", "content": content}]})
    assert error["param"] == "messages[0].content"
    assert "content parts of type text" in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}}),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("modalities", ["audio"]),
        ("store", True),
        ("reasoning_effort", "high"),
        ("web_search_options", {}),
    ],
)
async def test_parameters_that_would_change_the_answer_are_refused_by_name(
    http: httpx.AsyncClient, field: str, value: object
) -> None:
    error = await refused(http, CHAT, {"model": MODEL, "messages": ASK, field: value})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert field in error["message"]


@pytest.mark.parametrize(("field", "value"), [("suffix", "end"), ("best_of", 2), ("best_of", 99)])
async def test_suffix_and_best_of_are_refused_by_name(
    http: httpx.AsyncClient, field: str, value: object
) -> None:
    error = await refused(http, TEXT, {"model": MODEL, "prompt": "x", field: value})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


async def test_best_of_equal_to_n_changes_nothing_and_passes(http: httpx.AsyncClient) -> None:
    response = await http.post(
        TEXT, json={"model": MODEL, "prompt": "x", "best_of": 2, "n": 2, "suffix": None}
    )
    assert len(response.json()["choices"]) == 2


async def test_an_unknown_argument_is_refused_as_openai_does(http: httpx.AsyncClient) -> None:
    error = await refused(http, CHAT, {"model": MODEL, "messages": ASK, "temprature": 1})
    assert error["message"] == "Unrecognized request argument supplied: temprature"


async def test_a_missing_parameter_is_named(http: httpx.AsyncClient) -> None:
    assert (await refused(http, CHAT, {"model": MODEL}))["param"] == "messages"
    assert (await refused(http, TEXT, {"prompt": "x"}))["param"] == "model"


async def test_echo_with_logprobs_and_top_logprobs_alone_are_refused(http: httpx.AsyncClient) -> None:
    assert (await refused(http, TEXT, {"model": MODEL, "prompt": "x", "echo": True, "logprobs": 1}))[
        "param"
    ] == "echo"
    assert (await refused(http, CHAT, {"model": MODEL, "messages": ASK, "top_logprobs": 1}))[
        "param"
    ] == "top_logprobs"


async def test_ten_thousand_stop_strings_are_refused(http: httpx.AsyncClient) -> None:
    error = await refused(http, CHAT, {"model": MODEL, "messages": ASK, "stop": ["s"] * 10_000})
    assert error["param"] == "stop"
    assert "16" in error["message"]
    assert len(error["message"]) < 300


MANY = 40_000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", [-1] * MANY),
        ("prompt", [""] * MANY),
        ("prompt", [[]] * MANY),
        ("prompt", [[1]] * MANY),
        ("stop", [""] * MANY),
        ("logit_bias", {f"x{i}": 1 for i in range(MANY // 8)}),
        ("max_tokens", [0] * MANY),
    ],
)
async def test_a_body_with_very_many_faults_has_one_short_error(
    http: httpx.AsyncClient, field: str, value: object
) -> None:
    error = await refused(http, TEXT, {"model": MODEL, "prompt": "x", field: value})
    assert error["param"] == field
    assert len(error["message"]) < 300


async def test_an_unknown_model_is_not_found(http: httpx.AsyncClient) -> None:
    error = await refused(http, CHAT, {"model": "gpt-none", "messages": ASK}, status=404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "gpt-none" in error["message"]
    assert MODEL in error["message"]


@pytest.mark.parametrize("max_tokens", [None, 1])
async def test_a_prompt_as_long_as_the_window_is_refused_with_the_numbers(
    http: httpx.AsyncClient, max_tokens: int | None
) -> None:
    error = await refused(http, TEXT, {"model": MODEL, "prompt": [7] * WINDOW, "max_tokens": max_tokens})
    assert error["code"] == "context_length_exceeded"
    assert f"maximum context length is {WINDOW} tokens" in error["message"]


async def test_max_tokens_beyond_the_window_are_refused_with_the_numbers(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    error = await refused(http, TEXT, {"model": MODEL, "prompt": [7] * 6, "max_tokens": WINDOW - 5})
    assert error["code"] == "context_length_exceeded"
    assert f"{WINDOW + 1} tokens (6 of the prompt and {WINDOW - 5} of the completion)" in error["message"]
    assert dispatcher.generations == []
    assert (
        await http.post(TEXT, json={"model": MODEL, "prompt": [7] * 6, "max_tokens": WINDOW - 6})
    ).status_code == 200


async def test_a_huge_prompt_is_tokenized_and_refused(
    http: httpx.AsyncClient, settings: GatewaySettings
) -> None:
    text = "wheel " * (settings.thread_tokenize_chars // 5)
    error = await refused(http, CHAT, {"model": MODEL, "messages": [{"role": "user", "content": text}]})
    assert error["code"] == "context_length_exceeded"
    assert (await refused(http, TEXT, {"model": MODEL, "prompt": text}))["code"] == "context_length_exceeded"


async def test_a_prompt_that_no_tokenization_can_fit_is_refused_untokenized(
    http: httpx.AsyncClient, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(TextTokenizer, "encode")
    text = " " * (WINDOW * max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)))
    chat = await refused(http, CHAT, {"model": MODEL, "messages": [{"role": "user", "content": text}]})
    assert (chat["code"], chat["param"]) == ("context_length_exceeded", "messages")
    plain = await refused(http, TEXT, {"model": MODEL, "prompt": ["x" * len(text)]})
    assert (plain["code"], plain["param"]) == ("context_length_exceeded", "prompt")
    assert "at least" in plain["message"]


async def test_too_many_choices_are_refused(http: httpx.AsyncClient, settings: GatewaySettings) -> None:
    error = await refused(http, TEXT, {"model": MODEL, "prompt": ["x"] * settings.max_choices, "n": 2})
    assert str(settings.max_choices) in error["message"]


async def test_a_body_over_the_limit_is_refused_before_it_is_parsed(
    http: httpx.AsyncClient, settings: GatewaySettings
) -> None:
    error = await refused(http, TEXT, b"[" * (settings.max_body_bytes + 1), status=413)
    assert error["code"] == "request_too_large"
    assert (await http.post("/tokenize", content=b"x" * settings.max_body_bytes)).status_code == 400


async def test_a_body_of_another_media_type_is_refused(http: httpx.AsyncClient) -> None:
    response = await http.post(CHAT, data={"model": MODEL})
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


async def test_unknown_paths_and_methods_have_openai_errors(http: httpx.AsyncClient) -> None:
    missing = await http.get("/v2/nothing")
    assert missing.status_code == 404
    assert "/v2/nothing" in missing.json()["error"]["message"]
    wrong = await http.get(CHAT)
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["type"] == "invalid_request_error"


async def test_tokenize_takes_one_of_prompt_and_messages(http: httpx.AsyncClient) -> None:
    assert (await refused(http, "/tokenize", {"model": MODEL}))["param"] == "prompt"
    assert (await refused(http, "/tokenize", {"prompt": "x", "messages": ASK}))["param"] == "prompt"
    assert (await refused(http, "/detokenize", {"tokens": [99999]}))["param"] == "tokens"
    assert (await refused(http, "/detokenize", {"tokens": ["x"]}))["param"] == "tokens[0]"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (QueueFull("The queue is full.", retry_after_s=1.2), 429, "2"),
        (NoWorkers("No decode worker.", retry_after_s=0.1), 503, "1"),
        (GenerationFailed("Two workers died."), 500, None),
        (GenerationTimeout("No token for 60 s."), 504, None),
    ],
)
async def test_failures_before_the_first_token_have_their_status(
    http: httpx.AsyncClient,
    dispatcher: ScriptedDispatcher,
    error: RequestError,
    status: int,
    retry_after: str | None,
    stream: bool,
) -> None:
    dispatcher.script = lambda generation: [error]
    response = await http.post(TEXT, json={"model": MODEL, "prompt": "x", "stream": stream, "n": 2})
    assert response.status_code == status
    assert response.json()["error"]["message"] == error.message
    assert response.headers.get("retry-after") == retry_after


async def test_without_workers_every_model_is_unavailable(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.served = ()
    await refused(http, TEXT, {"model": MODEL, "prompt": "x"}, status=503)
