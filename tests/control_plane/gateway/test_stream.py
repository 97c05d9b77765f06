import asyncio
import json
import socket
from pathlib import Path

import httpx
import openai
import pytest

from control_plane.errors import GenerationFailed, QueueFull
from control_plane.gateway.metrics import GatewayMetrics
from control_plane.gateway.settings import GatewaySettings
from control_plane.gateway.tokenizer import TextTokenizer
from control_plane.generation import TokenChunk
from tests.control_plane.gateway.conftest import ANSWER
from tests.control_plane.gateway.scripted import MODEL, ScriptedDispatcher, endless, worker_like

BODY = {"model": MODEL, "prompt": "x", "max_tokens": 200}
WAIT_S = 10.0


def raw_request(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


@pytest.mark.parametrize("num_choices", [1, 3])
async def test_a_client_that_disconnects_mid_stream_aborts_every_generation(
    address: tuple[str, int], dispatcher: ScriptedDispatcher, metrics: GatewayMetrics, num_choices: int
) -> None:
    dispatcher.script = endless(40, pause=asyncio.Event())
    reader, writer = await asyncio.open_connection(*address)
    writer.write(raw_request(BODY | {"stream": True, "n": num_choices}))
    async with asyncio.timeout(WAIT_S):
        await reader.readuntil(b"data: ")
    assert metrics.registry.get_sample_value("penstock_gateway_open_streams") == 1
    writer.close()
    async with asyncio.timeout(WAIT_S):
        await dispatcher.closed.wait()
    assert len(dispatcher.aborted) == num_choices


async def test_a_client_that_disconnects_before_the_first_token_aborts_too(
    address: tuple[str, int], dispatcher: ScriptedDispatcher
) -> None:
    started, never = asyncio.Event(), asyncio.Event()

    def script(generation: object) -> list[asyncio.Event]:
        started.set()
        return [never]

    for stream in (False, True):
        started.clear()
        dispatcher.script = script
        _, writer = await asyncio.open_connection(*address)
        writer.write(raw_request(BODY | {"stream": stream}))
        async with asyncio.timeout(WAIT_S):
            await started.wait()
            writer.close()
            await dispatcher.closed.wait()
    assert len(dispatcher.aborted) == 2


class TestSlowReader:
    @pytest.fixture
    def settings(self, model_path: Path) -> GatewaySettings:
        return GatewaySettings(
            model_path=model_path,
            max_body_bytes=256 * 1024,
            stream_write_timeout_s=0.2,
            body_read_timeout_s=0.2,
        )

    async def test_a_client_that_stops_reading_is_disconnected_and_its_request_aborted(
        self, address: tuple[str, int], dispatcher: ScriptedDispatcher, metrics: GatewayMetrics
    ) -> None:
        dispatcher.script = endless(40)
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, address)
            await loop.sock_sendall(client, raw_request(BODY | {"stream": True}))
            async with asyncio.timeout(WAIT_S):
                await dispatcher.closed.wait()
            assert len(dispatcher.aborted) == 1
            assert metrics.registry.get_sample_value("penstock_gateway_open_streams") == 0
            tail = b""
            async with asyncio.timeout(WAIT_S):
                while data := await loop.sock_recv(client, 1 << 16):
                    tail = data
        assert b"[DONE]" not in tail

    async def test_a_body_that_never_ends_times_out(self, address: tuple[str, int]) -> None:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(raw_request(BODY)[:-1])
        async with asyncio.timeout(WAIT_S):
            assert b" 408 " in await reader.readline()
        writer.close()


async def test_a_slow_reader_within_the_limit_gets_everything(
    address: tuple[str, int], dispatcher: ScriptedDispatcher, tokenizer: TextTokenizer
) -> None:
    text = ANSWER * 5
    dispatcher.script = worker_like(tokenizer, text)
    reader, writer = await asyncio.open_connection(*address, limit=64)
    writer.write(raw_request(BODY | {"stream": True, "max_tokens": 250}))
    data = b""
    async with asyncio.timeout(WAIT_S):
        while not data.endswith(b"0\r\n\r\n"):
            data += await reader.read(64)
    writer.close()
    assert b"data: [DONE]" in data


async def test_a_body_in_chunks_over_the_limit_is_refused(
    address: tuple[str, int], settings: GatewaySettings
) -> None:
    async def chunks() -> object:
        for _ in range(settings.max_body_bytes // 1024 + 1):
            yield b"x" * 1024

    async with httpx.AsyncClient() as client:
        url = f"http://{address[0]}:{address[1]}/v1/completions"
        response = await client.post(url, content=chunks(), headers={"content-type": "application/json"})  # type: ignore[arg-type]
    assert response.status_code == 413


@pytest.mark.parametrize("num_choices", [1, 2])
async def test_an_error_after_the_first_token_is_an_event_and_the_end(
    client: openai.AsyncOpenAI, dispatcher: ScriptedDispatcher, num_choices: int
) -> None:
    error = GenerationFailed("The last decode worker died.")
    dispatcher.script = lambda generation: [TokenChunk(token_ids=(40, 41)), error]
    stream = await client.completions.create(model=MODEL, prompt="x", stream=True, n=num_choices)
    texts = []
    with pytest.raises(openai.APIError, match="The last decode worker died"):
        texts += [chunk.choices[0].text async for chunk in stream]
    assert dispatcher.num_open == 0


async def test_a_generation_that_ends_without_a_reason_is_a_failure(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    dispatcher.script = lambda generation: [TokenChunk(token_ids=(40,))]
    response = await http.post("/v1/completions", json=BODY)
    assert response.status_code == 500
    assert "without a finish reason" in response.json()["error"]["message"]


async def test_one_choices_failure_aborts_the_others(
    http: httpx.AsyncClient, dispatcher: ScriptedDispatcher
) -> None:
    never = asyncio.Event()
    full = QueueFull("full", retry_after_s=1)
    dispatcher.script = lambda generation: [full if generation.request_id.endswith("-2") else never]
    response = await http.post("/v1/completions", json=BODY | {"n": 4})
    assert response.status_code == 429
    assert len(dispatcher.aborted) == 3


async def test_two_hundred_streams_at_once_are_all_whole(
    address: tuple[str, int], dispatcher: ScriptedDispatcher, metrics: GatewayMetrics
) -> None:
    async def one() -> str:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(raw_request(BODY | {"stream": True}))
        data = await reader.readuntil(b"0\r\n\r\n")
        writer.close()
        events = [line[6:] for line in data.splitlines() if line.startswith(b"data: {")]
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        tasks = [group.create_task(one()) for _ in range(200)]
    assert {task.result() for task in tasks} == {ANSWER}
    assert dispatcher.num_open == 0
    assert dispatcher.aborted == []
    assert metrics.registry.get_sample_value("penstock_gateway_open_streams") == 0
