"""A small byte-level tokenizer in a model directory, a scripted dispatcher, and the app over both."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from control_plane.gateway.app import create_app
from control_plane.gateway.http_protocol import GatewayProtocol
from control_plane.gateway.metrics import GatewayMetrics
from control_plane.gateway.settings import GatewaySettings
from control_plane.gateway.tokenizer import TextTokenizer, load_tokenizer
from tests.control_plane.fake_cluster import Cluster
from tests.control_plane.gateway.move_scene import Stage, stage_over
from tests.control_plane.gateway.scripted import (
    ASSISTANT,
    BOS,
    END,
    EOS,
    SYSTEM,
    USER,
    ScriptedDispatcher,
    worker_like,
)

ANSWER = "Water turns the wheel: naïve, 日本語 and 😀."
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role') }}{% endif %}"
    "{{ '<' + message.role + '>' + message.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[BOS, EOS, SYSTEM, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["Water turns the wheel that turns the mill: a naïve little machine."] * 4, trainer
    )
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> TextTokenizer:
    return load_tokenizer(model_path)


@pytest.fixture
def settings(model_path: Path) -> GatewaySettings:
    return GatewaySettings(model_path=model_path, max_body_bytes=256 * 1024, stream_write_timeout_s=30.0)


@pytest.fixture
def metrics() -> GatewayMetrics:
    return GatewayMetrics(CollectorRegistry())


@pytest.fixture
def dispatcher(tokenizer: TextTokenizer) -> ScriptedDispatcher:
    return ScriptedDispatcher(worker_like(tokenizer, ANSWER))


@pytest.fixture
def app(
    dispatcher: ScriptedDispatcher,
    tokenizer: TextTokenizer,
    settings: GatewaySettings,
    metrics: GatewayMetrics,
) -> FastAPI:
    return create_app(dispatcher=dispatcher, tokenizer=tokenizer, settings=settings, metrics=metrics)


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


@pytest.fixture
async def client(http: httpx.AsyncClient) -> openai.AsyncOpenAI:
    """The official client, without its own retries."""
    return openai.AsyncOpenAI(api_key="none", base_url="http://gateway/v1", http_client=http, max_retries=0)


@pytest.fixture
async def address(app: FastAPI) -> AsyncIterator[tuple[str, int]]:
    """Host and port of a real server over the app."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=GatewayProtocol, ws="none", lifespan="off", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    yield listener.getsockname()
    server.should_exit = True
    await asyncio.wait_for(serving, 10)
    listener.close()


@pytest.fixture
def stage(cluster: Cluster) -> Stage:
    return stage_over(cluster)
