from collections import Counter

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import load_all_checks, positive_data_acceptance

from tests.control_plane.gateway.scripted import MODEL

load_all_checks()
POSTS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
GETS = ("/v1/models", "/v1/models/{name}", "/health", "/ready", "/version", "/metrics")


def check_operation(
    app: FastAPI, *, path: str, method: str, mode: GenerationMode, num_examples: int
) -> Counter[int]:
    operation = schemathesis.openapi.from_asgi("/openapi.json", app)[path][method]

    statuses = Counter[int]()

    # The same examples each time: what a run of the suite tests must not depend on luck.
    @settings(
        max_examples=num_examples,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Case) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = MODEL
        # A body may fit the schema and still ask for what the model's window or vocabulary cannot give.
        response = case.call_and_validate(excluded_checks=[positive_data_acceptance])
        statuses[response.status_code] += 1

    check()
    return statuses


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", POSTS)
def test_bodies_are_accepted_and_refused_as_the_document_says(
    app: FastAPI, path: str, mode: GenerationMode
) -> None:
    statuses = check_operation(app, path=path, method="POST", mode=mode, num_examples=30)
    assert (200 in statuses) == (mode is GenerationMode.POSITIVE), statuses


@pytest.mark.parametrize("stream", [False, True])
def test_whole_and_streamed_answers_are_as_the_document_says(app: FastAPI, stream: bool) -> None:
    document = schemathesis.openapi.from_asgi("/openapi.json", app)
    common = {"model": MODEL, "stream": stream, "max_tokens": 5, "n": 2}
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2}
    text = {"prompt": "x", "logprobs": 2}
    for path, body in (("/v1/chat/completions", common | chat), ("/v1/completions", common | text)):
        case = document[path]["POST"].Case(body=body, media_type="application/json")
        assert case.call_and_validate().status_code == 200


@pytest.mark.parametrize("path", GETS)
def test_what_is_read_is_as_the_document_says(app: FastAPI, path: str) -> None:
    check_operation(app, path=path, method="GET", mode=GenerationMode.POSITIVE, num_examples=5)


def test_the_document_names_every_path_its_body_and_its_errors(app: FastAPI) -> None:
    document = app.openapi()
    assert set(document["paths"]) == {*POSTS, *GETS}
    for path in POSTS:
        operation = document["paths"][path]["post"]
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference.rpartition("/")[2] in document["components"]["schemas"]
        assert {"200", "400", "404", "413", "415", "503"} <= set(operation["responses"])
        if "422" in operation["responses"]:  # ours, not FastAPI's
            schema = operation["responses"]["422"]["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("/ErrorReply")
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert "text/event-stream" in chat["200"]["content"]
    assert "429" in chat
