"""Connections and listeners on real sockets."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from kvstore.addresses import Address, TcpAddress, UnixAddress
from kvstore.data_plane import Connection, FrameBuffer, connect
from kvstore.errors import TransferCorrupted, TransferInterrupted
from kvstore.frames import HEADER_BYTES, MAX_PAYLOAD_BYTES, FrameHeader, FrameKind
from kvstore.listener import Listener

pytestmark = pytest.mark.usefixtures("nothing_is_left")
SOON_S = 5.0


def blocks(num_bytes: int) -> FrameHeader:
    return FrameHeader(kind=FrameKind.BLOCKS, layer=1, first_block=2, num_blocks=3, payload_bytes=num_bytes)


async def send(connection: Connection, payload: bytes) -> None:
    buffer = FrameBuffer(len(payload))
    buffer.payload(len(payload))[:] = payload
    await connection.send(blocks(len(payload)), buffer)


async def receive(connection: Connection) -> bytes:
    header = await connection.receive_header()
    payload = bytearray(header.payload_bytes)
    await connection.receive_payload(header, into=memoryview(payload))
    return bytes(payload)


@contextlib.contextmanager
def pair(*, idle_timeout_s: float = SOON_S) -> Iterator[tuple[Connection, socket.socket]]:
    """A connection and its peer's bare socket."""
    ours, theirs = socket.socketpair()
    with Connection(ours, peer="the peer", idle_timeout_s=idle_timeout_s) as connection, theirs:
        yield connection, theirs


@pytest.fixture(params=["tcp", "tcp6", "unix"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Address:
    match request.param:
        case "tcp":
            return TcpAddress(host="127.0.0.1", port=0)
        case "tcp6":
            return TcpAddress(host="::1", port=0)
    return UnixAddress(path=str(tmp_path / "data.sock"))


class Echo:
    """A listener that sends every frame back, counts its peers and can be told not to answer yet."""

    def __init__(self, *, max_connections: int = 4) -> None:
        self.num_seen = 0
        self.go = asyncio.Event()
        self.go.set()
        self.arrived = asyncio.Condition()
        self.listener = Listener(self.handle, max_connections=max_connections, idle_timeout_s=SOON_S)

    async def handle(self, connection: Connection) -> None:
        async with self.arrived:
            self.num_seen += 1
            self.arrived.notify_all()
        await self.go.wait()
        with contextlib.suppress(TransferInterrupted):
            while True:
                await send(connection, await receive(connection))

    async def wait_for(self, num_seen: int) -> None:
        async with asyncio.timeout(SOON_S), self.arrived:
            await self.arrived.wait_for(lambda: self.num_seen >= num_seen)

    async def connect(self) -> Connection:
        return await connect(self.listener.address, timeout_s=SOON_S, idle_timeout_s=SOON_S)


@pytest_asyncio.fixture
async def echo(address: Address) -> AsyncIterator[Echo]:
    server = Echo()
    await server.listener.start(address)
    yield server
    await server.listener.close()


@pytest.mark.parametrize("num_bytes", [0, 1, 65_537, MAX_PAYLOAD_BYTES])
async def test_a_frame_of_any_size_comes_back_unchanged(echo: Echo, num_bytes: int) -> None:
    payload = bytes(range(256)) * (num_bytes // 256 + 1)
    payload = payload[:num_bytes]
    with await echo.connect() as connection:
        sending = asyncio.create_task(send(connection, payload))
        assert await receive(connection) == payload
        await sending


async def test_many_peers_are_served_at_once(echo: Echo) -> None:
    async def talk(number: int) -> bytes:
        with await echo.connect() as connection:
            for _ in range(20):
                await send(connection, bytes([number]) * 1000)
                found = await receive(connection)
        return found

    assert await asyncio.gather(*map(talk, range(20))) == [bytes([n]) * 1000 for n in range(20)]


async def test_a_peer_too_many_waits_for_another_to_leave(address: Address) -> None:
    echo = Echo(max_connections=2)
    await echo.listener.start(address)
    first, second, third = await echo.connect(), await echo.connect(), await echo.connect()
    await echo.wait_for(2)
    answer = asyncio.create_task(receive(third))
    await send(third, b"third")
    await send(second, b"second")
    assert await receive(second) == b"second"
    assert echo.listener.num_connections == 2
    assert not answer.done()

    first.close()

    assert await answer == b"third"
    second.close()
    third.close()
    await echo.listener.close()


async def test_closing_a_listener_ends_its_handlers(echo: Echo) -> None:
    echo.go.clear()
    with await echo.connect() as connection:
        await echo.wait_for(1)
        await echo.listener.close()
        assert echo.listener.num_connections == 0
        with pytest.raises(TransferInterrupted):
            await receive(connection)


async def test_a_handler_that_fails_is_logged_and_its_connection_closed(
    address: Address, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(connection: Connection) -> None:
        raise LookupError(f"nothing for {connection.peer}")

    listener = Listener(fail, max_connections=1, idle_timeout_s=SOON_S)
    await listener.start(address)
    for _ in range(3):  # the slot is free again every time
        connection = await connect(listener.address, timeout_s=SOON_S, idle_timeout_s=SOON_S)
        with connection, pytest.raises(TransferInterrupted, match=r"closed|broke"):
            await receive(connection)
    await listener.close()
    assert caplog.text.count("LookupError: nothing for") == 3


async def test_a_socket_file_left_by_a_dead_process_is_replaced(tmp_path: Path) -> None:
    address = UnixAddress(path=str(tmp_path / "data.sock"))
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(address.path)
    dead.close()
    echo = Echo()
    await echo.listener.start(address)
    with await echo.connect() as connection:
        await send(connection, b"alive")
        assert await receive(connection) == b"alive"
    with pytest.raises(OSError, match="in use"):
        await Echo().listener.start(address)
    await echo.listener.close()
    with pytest.raises(TransferInterrupted, match="No such file"):
        await echo.connect()


async def test_nobody_listening_is_an_interruption(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    for address in (TcpAddress(host="127.0.0.1", port=port), UnixAddress(path=str(tmp_path / "none.sock"))):
        with pytest.raises(TransferInterrupted, match="no connection to"):
            await connect(address, timeout_s=SOON_S, idle_timeout_s=SOON_S)


async def test_a_silent_peer_is_an_interruption() -> None:
    expected = pytest.raises(TransferInterrupted, match=r"did nothing for 0\.05 s")
    with pair(idle_timeout_s=0.05) as (connection, _), expected:
        await connection.receive_header()


async def test_a_peer_that_takes_nothing_is_an_interruption() -> None:
    expected = pytest.raises(TransferInterrupted, match="did nothing for")
    with pair(idle_timeout_s=0.05) as (connection, _), expected:
        await send(connection, bytes(MAX_PAYLOAD_BYTES))


async def test_a_peer_that_leaves_inside_a_payload_is_an_interruption() -> None:
    with pair() as (connection, peer):
        receiving = asyncio.create_task(receive(connection))
        buffer = FrameBuffer(1000)
        peer.send(buffer.sealed(blocks(1000))[: HEADER_BYTES + 10])
        peer.close()
        with pytest.raises(TransferInterrupted, match="closed"):
            await receiving


async def test_sending_to_a_peer_that_left_is_an_interruption() -> None:
    with pair() as (connection, peer):
        peer.close()
        with pytest.raises(TransferInterrupted, match="broke"):
            await send(connection, b"x")


async def test_a_changed_payload_is_corrupt() -> None:
    with pair() as (connection, peer):
        buffer = FrameBuffer(4)
        frame = bytearray(buffer.sealed(blocks(4)))
        frame[-1] ^= 1
        peer.send(frame)
        with pytest.raises(TransferCorrupted, match="checksum of a frame"):
            await receive(connection)


async def test_a_fast_peer_does_not_keep_others_from_running() -> None:
    """The socket is always ready: without turns neither the counter nor the timer would ever run."""
    with (
        pair() as (connection, peer_socket),
        Connection(peer_socket, peer="the flood", idle_timeout_s=SOON_S) as peer,
    ):
        counter, received = 0, 0

        async def count() -> None:
            nonlocal counter
            while True:
                counter += 1
                await asyncio.sleep(0)

        async def flood() -> None:
            while True:
                await send(peer, bytes(100))

        flooding, counting = asyncio.create_task(flood()), asyncio.create_task(count())
        for _ in range(1000):
            await receive(connection)
            received += 1
        for task in (flooding, counting):
            task.cancel()
        await asyncio.gather(flooding, counting, return_exceptions=True)
        assert received == 1000
        assert counter >= 1000 / 32 - 1


@pytest.mark.parametrize("num_turns", range(6))
async def test_a_cancelled_connect_leaves_nothing(echo: Echo, num_turns: int) -> None:
    task = asyncio.create_task(echo.connect())
    for _ in range(num_turns):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        (await task).close()
