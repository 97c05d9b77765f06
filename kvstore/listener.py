"""Accepts connections of the data plane on a TCP or Unix socket."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable

from kvstore.addresses import Address, TcpAddress, UnixAddress
from kvstore.data_plane import Connection, resolve

LISTEN_BACKLOG = 128
ACCEPT_RETRY_S = 0.1

logger = logging.getLogger(__name__)

Handler = Callable[[Connection], Awaitable[None]]


class Listener:
    """Accepts at most `max_connections` at a time and runs `handler` on each in a task of its own.

    Further peers wait in the kernel's backlog. A connection is closed when its handler ends. What the handler
    raises is logged: handlers deal with the errors of their peers themselves.
    """

    def __init__(self, handler: Handler, *, max_connections: int, idle_timeout_s: float) -> None:
        self._handler = handler
        self._max_connections = max_connections
        self._idle_timeout_s = idle_timeout_s
        self._socket: socket.socket | None = None
        self._address: Address | None = None
        self._accepting = False
        self._retry: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> Address:
        """Where it listens, with the port the system chose."""
        if self._address is None:
            raise RuntimeError("the listener has not been started")
        return self._address

    @property
    def num_connections(self) -> int:
        return len(self._tasks)

    async def start(self, address: Address) -> None:
        """Raises OSError if the address cannot be bound."""
        match address:
            case UnixAddress(path=path):
                self._socket = _bind_unix(path)
                self._address = address
            case TcpAddress(host=host, port=port):
                family, target = await resolve(host, port)
                self._socket = socket.create_server(target, family=family, backlog=LISTEN_BACKLOG)
                self._address = TcpAddress(host=host, port=self._socket.getsockname()[1])
        self._socket.setblocking(False)
        self._resume()

    async def close(self) -> None:
        """Stops listening, cancels all handlers and waits for them. Idempotent."""
        self._pause()
        if self._retry is not None:
            self._retry.cancel()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            if isinstance(self._address, UnixAddress):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._address.path)
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _resume(self) -> None:
        if self._socket is None or self._accepting:
            return
        if self.num_connections < self._max_connections:
            # Not `loop.sock_accept`: cancelling that at the wrong moment loses an accepted socket.
            asyncio.get_running_loop().add_reader(self._socket.fileno(), self._accept, self._socket)
            self._accepting = True

    def _pause(self) -> None:
        if self._socket is not None and self._accepting:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._accepting = False

    def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            peer_socket, peer_name = listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # out of file descriptors: retrying at once would spin
            logger.error("cannot accept a connection on %s: %s", self._address, error)
            self._pause()
            self._retry = loop.call_later(ACCEPT_RETRY_S, self._resume)
            return
        connection = Connection(peer_socket, peer=_peer_text(peer_name), idle_timeout_s=self._idle_timeout_s)
        task = loop.create_task(self._handle(connection))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._forget(done, connection))
        if self.num_connections >= self._max_connections:
            self._pause()

    def _forget(self, task: asyncio.Task[None], connection: Connection) -> None:
        connection.close()  # also when the task was cancelled before its first step
        self._tasks.discard(task)
        self._resume()

    async def _handle(self, connection: Connection) -> None:
        try:
            await self._handler(connection)
        except Exception:
            logger.exception("the handler of a connection from %s failed", connection.peer)


def _peer_text(name: object) -> str:
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "a local peer"


def _bind_unix(path: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        if not is_answered(path):
            os.unlink(path)  # left behind by a process that died
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(path)
        listening.listen(LISTEN_BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def is_answered(path: str) -> bool:
    """Whether somebody listens on this Unix socket; False too if it is not there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True
