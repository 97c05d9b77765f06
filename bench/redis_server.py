"""A real redis-server on a Unix socket, that can be killed, emptied, frozen and filled."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

START_TIMEOUT_S = 10.0


class RedisServer:
    def __init__(self, directory: Path) -> None:
        binary = shutil.which("redis-server")
        assert binary, "this needs redis-server: say make redis, or install the package redis-server"
        self._binary = binary
        self._socket = directory / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def client(self) -> Redis:
        return Redis.from_url(self.url, socket_timeout=START_TIMEOUT_S, protocol=2)

    def start(self) -> None:
        """Empty, whatever it held before."""
        self._process = subprocess.Popen(
            [
                self._binary,
                "--port",
                "0",
                "--unixsocket",
                str(self._socket),
                "--save",
                "",
                "--appendonly",
                "no",
            ],
            cwd=self._socket.parent,
            stdout=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            assert time.monotonic() < deadline_s, "redis-server does not start"
            time.sleep(0.005)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def fill(self) -> None:
        """Every write is refused from now on."""
        with self.client() as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "1")

    def empty_out(self) -> None:
        """There is room again."""
        with self.client() as client:
            client.config_set("maxmemory", "0")

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "redis-server does not run"
        os.kill(self._process.pid, number)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except (RedisError, OSError):
            return False
