import http.server
import json
import os
import pty
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from control_plane.cli.__main__ import app
from control_plane.config import PROJECT_ROOT

ON_TERMINAL = str(Path(__file__).with_name("on_terminal.py"))


class Gateway(http.server.ThreadingHTTPServer):
    """Answers a chat with the words of its last message, one event each; "wait" holds the answer open."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, Any]] = []
        self.client_left = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Gateway
    models: ClassVar[bytes] = b'{"data": [{"id": "echo"}]}'

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.end_headers()
        self.wfile.write(self.models if self.path == "/v1/models" else b"what?")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        text = body["messages"][-1]["content"]
        if text == "too long":
            self.send_response(400)
            self.end_headers()
            self.wfile.write(
                b'{"error": {"message": "4096 tokens are too many", "code": "context_length_exceeded"}}'
            )
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        words = text.split()
        for number, word in enumerate(words):
            self.say({"choices": [{"index": 0, "delta": {"content": f" {word}" if number else word}}]})
        if text == "break off":
            self.say({"error": {"message": "the pool is gone"}})
            return
        if text == "wait":
            self.wait_for_the_client_to_leave()
            return
        reason = "length" if "cut" in words else "stop"
        self.say({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        usage = {
            "prompt_tokens": 32,
            "completion_tokens": len(words),
            "prompt_tokens_details": {"cached_tokens": 16},
        }
        self.say({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def say(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def wait_for_the_client_to_leave(self) -> None:
        select.select([self.connection], [], [], 30)
        self.server.client_left.set()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def chat(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, ["chat", *arguments], input=stdin)


def test_a_prompt_argument_is_answered_once(gateway: Gateway) -> None:
    result = chat("--url", gateway.url, "hello", "out", "there")
    assert result.exit_code == 0
    assert result.stdout == "hello out there\n"
    (request,) = gateway.requests
    assert request["model"] == "echo"
    assert request["messages"] == [{"role": "user", "content": "hello out there"}]
    assert request["stream"] is True


def test_a_piped_prompt_is_answered_once(gateway: Gateway) -> None:
    result = chat("--url", f"{gateway.url}/v1/", stdin="from a\npipe")
    assert result.exit_code == 0
    assert result.stdout == "from a pipe\n"


def test_an_answer_that_was_cut_says_so_beside_it(gateway: Gateway) -> None:
    result = chat("cut here", "--url", gateway.url)
    assert result.stdout == "cut here\n"
    assert result.stderr == "(cut at the longest length; --max-tokens sets another one)\n"


def test_flags_become_fields_of_the_request(gateway: Gateway) -> None:
    flags = ["--model", "mine", "--system", "be brief", "--max-tokens", "7", "--temperature", "0"]
    assert chat("--url", gateway.url, *flags, "hi").exit_code == 0
    (request,) = gateway.requests
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("mine", 7, 0)
    assert request["messages"][0] == {"role": "system", "content": "be brief"}


def test_control_characters_of_an_answer_do_not_reach_the_terminal(gateway: Gateway) -> None:
    assert chat("--url", gateway.url, "a\x1b[2Jb\x07c").stdout == "a[2Jbc\n"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("too long", "400 from {url}/v1/chat/completions: 4096 tokens are too many"),
        ("break off", "the answer broke off: the pool is gone"),
        (" ", "the prompt is empty"),
    ],
)
def test_failures_are_one_line(gateway: Gateway, prompt: str, message: str) -> None:
    result = chat("--url", gateway.url, prompt)
    assert result.exit_code == 1
    assert result.stderr == f"penstock: {message.format(url=gateway.url)}\n"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1", "http://127.0.0.1:1 does not answer: [Errno 111] Connection refused"),
        ("localhost:8000", "localhost:8000 does not answer: "),
        ("http://127.0.0.1:port", "'http://127.0.0.1:port' is not a URL"),
    ],
)
def test_a_gateway_that_is_not_there_is_one_line(url: str, message: str) -> None:
    result = chat("--url", url, "hi")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"penstock: {message}")
    assert result.stderr.count("\n") == 1


def test_without_a_cluster_and_a_url_it_says_what_to_do(run_dir: Path) -> None:
    result = chat("--run-dir", str(run_dir), "hi")
    assert result.exit_code == 1
    assert result.stderr == (
        f"penstock: nothing runs in {run_dir}: start it with penstock up, or name its --run-dir or a gateway's --url\n"
    )


class Terminal:
    """`penstock chat` as a person sees it."""

    def __init__(self, url: str) -> None:
        self.output = ""
        self._mine, its = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, ON_TERMINAL, sys.executable, "-m", "control_plane.cli", "chat", "--url", url],
            stdin=its, stdout=its, stderr=its, cwd=PROJECT_ROOT, start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(its)

    def type(self, text: str) -> None:
        os.write(self._mine, text.encode())

    def read_until(self, text: str) -> str:
        """What came since the last call, up to `text`."""
        while text not in self.output:
            assert select.select([self._mine], [], [], 30)[0], f"{text!r} did not appear in {self.output!r}"
            self.output += os.read(self._mine, 4096).decode()
        before, _, self.output = self.output.partition(text)
        return before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._mine)


@pytest.fixture
def terminal(gateway: Gateway) -> Iterator[Terminal]:
    terminal = Terminal(gateway.url)
    yield terminal
    terminal.close()


def test_a_conversation_remembers_its_turns(gateway: Gateway, terminal: Terminal) -> None:
    terminal.read_until("\n> ")
    terminal.type("one two\n")
    answer = terminal.read_until("\n> ")
    assert "2 tokens, the first after" in answer
    assert "16 of 32 prompt tokens were cached" in answer
    terminal.type("three\n")
    terminal.read_until("\n> ")
    assert [message["content"] for message in gateway.requests[-1]["messages"]] == [
        "one two",
        "one two",
        "three",
    ]
    terminal.type("/clear\n")
    terminal.read_until("\n> ")
    terminal.type("four\n")
    terminal.read_until("\n> ")
    assert gateway.requests[-1]["messages"] == [{"role": "user", "content": "four"}]
    terminal.type("/exit\n")
    assert terminal.process.wait(30) == 0


def test_ctrl_c_stops_the_answer_and_not_the_conversation(gateway: Gateway, terminal: Terminal) -> None:
    terminal.read_until("\n> ")
    terminal.type("wait\n")
    terminal.read_until("wait")  # the echo of what was typed
    terminal.read_until("wait")
    terminal.type("\x03")
    terminal.read_until("[stopped]")
    assert gateway.client_left.wait(30)
    terminal.read_until("\n> ")
    terminal.type("\x03")
    terminal.read_until("/exit or Ctrl-D")
    terminal.read_until("\n> ")
    terminal.type("too long\n")
    terminal.read_until("penstock: 400 from")
    terminal.read_until("\n> ")
    terminal.type("go on\n")
    terminal.read_until("\n> ")
    contents = [message["content"] for message in gateway.requests[-1]["messages"]]
    assert contents == ["wait", "wait", "go on"]
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0
