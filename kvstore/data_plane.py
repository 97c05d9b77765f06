"""Frames over TCP and Unix sockets on asyncio: no copies between the socket and the caller's buffer.

A `Connection` is used by one task that sends and one that receives, which may be the same. Whoever is cancelled
or fails inside a send or a receive closes it: the stream is then at an unknown place.
"""

import asyncio
import contextlib
import ipaddress
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from kvstore.addresses import Address, TcpAddress, UnixAddress
from kvstore.errors import TransferInterrupted
from kvstore.frames import HEADER_BYTES, FrameHeader, pack_header, unpack_header, verify

# After so many frames or bytes other tasks get a turn: a ready socket never suspends the task by itself.
MAX_FRAMES_PER_TURN = 32
MAX_BYTES_PER_TURN = 2 * 2**20
# The peer must have taken so much within the idle timeout: 0.4 Mbit/s with 5 s.
SEND_SLICE_BYTES = 256 * 2**10
# Checksums of more are computed in a thread: XXH3 reads 23 GB/s on a core of a server of 2023, 4 MiB in 0.2 ms.
MAX_INLINE_CHECK_BYTES = 4 * 2**20


class FrameBuffer:
    """Memory for one outgoing frame: the header lies right before the payload, so both leave in one call."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._memory = memoryview(bytearray(HEADER_BYTES + capacity_bytes))

    def payload(self, size_bytes: int) -> memoryview:
        """The first `size_bytes` of the payload, to be filled."""
        return self._memory[HEADER_BYTES : HEADER_BYTES + size_bytes]

    def sealed(self, header: FrameHeader) -> memoryview:
        """Header and payload, ready to be sent."""
        pack_header(header, payload=self.payload(header.payload_bytes), into=self._memory[:HEADER_BYTES])
        return self._memory[: HEADER_BYTES + header.payload_bytes]


@dataclass(frozen=True, slots=True)
class SealedFrame:
    """A frame whose payload stays where it was made. Sealing reads all of it: large ones are sealed in a thread."""

    header: memoryview
    payload: memoryview

    @classmethod
    def seal(cls, header: FrameHeader, payload: memoryview) -> Self:
        packed = memoryview(bytearray(HEADER_BYTES))
        pack_header(header, payload=payload, into=packed)
        return cls(packed, payload)


class Connection:
    """One peer. A peer that neither sends nor takes anything for `idle_timeout_s` counts as broken."""

    def __init__(self, peer_socket: socket.socket, *, peer: str, idle_timeout_s: float) -> None:
        peer_socket.setblocking(False)
        if peer_socket.family != socket.AF_UNIX:
            peer_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = peer
        self._socket = peer_socket
        self._idle_timeout_s = idle_timeout_s
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._num_frames = 0
        self._num_bytes = 0
        # One timer for the connection's life: an `asyncio.timeout` around every wait costs 8 us a frame.
        self._timer: asyncio.TimerHandle | None = None
        self._num_waiting = 0  # of the sender and the receiver
        self._waits_until_s = 0.0
        self._gave_up = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._socket.close()

    async def send(self, header: FrameHeader, buffer: FrameBuffer) -> None:
        """Sends one frame whose payload is already in `buffer`. Raises TransferInterrupted."""
        await self._take_turns()
        await self._send(buffer.sealed(header))

    async def send_sealed(self, frame: SealedFrame) -> None:
        """Sends one frame. Raises TransferInterrupted."""
        await self._take_turns()
        await self._send(frame.header)
        await self._send(frame.payload)

    async def receive_header(self) -> FrameHeader:
        """Waits for the next frame. Its payload, if any, must be received next.

        Raises TransferInterrupted, or TransferCorrupted for what is no header of this version.
        """
        await self._take_turns()
        await self._receive(self._header)
        return unpack_header(self._header)

    async def receive_payload(self, header: FrameHeader, *, into: memoryview) -> None:
        """Fills `into` (exactly `header.payload_bytes` long) and verifies the frame's checksum.

        Raises TransferInterrupted or TransferCorrupted.
        """
        if len(into) != header.payload_bytes:
            raise ValueError(f"buffer is {len(into)} bytes, the payload {header.payload_bytes}")
        await self._receive(into)
        if len(into) > MAX_INLINE_CHECK_BYTES:
            await asyncio.to_thread(verify, self._header, into)
        else:
            verify(self._header, into)
        self._count(HEADER_BYTES + len(into))

    async def _send(self, data: memoryview) -> None:
        try:
            num_sent = self._socket.send(data)
        except BlockingIOError:
            num_sent = 0
        except OSError as error:
            raise self._broken(error) from error
        if num_sent < len(data):
            await self._send_rest(data[num_sent:])
        elif self._num_waiting > 0:
            self._wait_from_now(asyncio.get_running_loop())  # for the receiver: this peer lives
        self._count(len(data))

    async def _receive(self, into: memoryview) -> None:
        num_received = 0
        try:
            # Most of the time the bytes are there already: no timer, no trip through the event loop.
            while num_received < len(into):
                num_received += self._checked(self._socket.recv_into(into[num_received:]))
        except BlockingIOError:
            await self._receive_rest(into[num_received:])
        except OSError as error:
            raise self._broken(error) from error

    async def _receive_rest(self, into: memoryview) -> None:
        loop = asyncio.get_running_loop()
        num_received = 0
        self._num_waiting += 1
        try:
            while num_received < len(into):
                self._wait_from_now(loop)
                num_received += self._checked(await loop.sock_recv_into(self._socket, into[num_received:]))
        except OSError as error:
            raise self._broken(error) from error
        finally:
            self._num_waiting -= 1

    async def _send_rest(self, data: memoryview) -> None:
        loop = asyncio.get_running_loop()
        self._num_waiting += 1
        try:
            for start in range(0, len(data), SEND_SLICE_BYTES):
                self._wait_from_now(loop)
                await loop.sock_sendall(self._socket, data[start : start + SEND_SLICE_BYTES])
        except OSError as error:
            raise self._broken(error) from error
        finally:
            self._num_waiting -= 1

    def _wait_from_now(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waits_until_s = loop.time() + self._idle_timeout_s
        if self._timer is None:
            self._timer = loop.call_at(self._waits_until_s, self._check_peer, loop)

    def _check_peer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._num_waiting == 0:
            return
        if loop.time() < self._waits_until_s:
            self._timer = loop.call_at(self._waits_until_s, self._check_peer, loop)
            return
        self._gave_up = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for it

    def _checked(self, num_received: int) -> int:
        if num_received == 0:
            raise (
                self._silent() if self._gave_up else TransferInterrupted(f"{self.peer} closed the connection")
            )
        return num_received

    def _broken(self, error: OSError) -> TransferInterrupted:
        if self._gave_up:
            return self._silent()
        return TransferInterrupted(f"connection to {self.peer} broke: {error}")

    def _silent(self) -> TransferInterrupted:
        return TransferInterrupted(f"{self.peer} did nothing for {self._idle_timeout_s:g} s")

    def _count(self, num_bytes: int) -> None:
        self._num_frames += 1
        self._num_bytes += num_bytes

    async def _take_turns(self) -> None:
        if self._num_frames >= MAX_FRAMES_PER_TURN or self._num_bytes >= MAX_BYTES_PER_TURN:
            self._num_frames = self._num_bytes = 0
            await asyncio.sleep(0)


async def connect(address: Address, *, timeout_s: float, idle_timeout_s: float) -> Connection:
    """Raises TransferInterrupted if there is no connection within `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            peer_socket = await _open_socket(address)
    except TimeoutError as error:
        raise TransferInterrupted(f"no connection to {address} within {timeout_s:g} s") from error
    except OSError as error:
        raise TransferInterrupted(f"no connection to {address}: {error}") from error
    return Connection(peer_socket, peer=str(address), idle_timeout_s=idle_timeout_s)


async def _open_socket(address: Address) -> socket.socket:
    loop = asyncio.get_running_loop()
    family: socket.AddressFamily
    target: str | tuple[str, int]
    match address:
        case UnixAddress(path=path):
            family, target = socket.AF_UNIX, path
        case TcpAddress(host=host, port=port):
            family, target = await resolve(host, port)
    peer_socket = socket.socket(family, socket.SOCK_STREAM)
    try:
        peer_socket.setblocking(False)
        await loop.sock_connect(peer_socket, target)
    except BaseException:
        peer_socket.close()
        raise
    return peer_socket


async def resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Raises OSError for a name nobody knows. Numbers are not looked up: that would cost a thread."""
    with contextlib.suppress(ValueError):
        version = ipaddress.ip_address(host).version
        return (socket.AF_INET6 if version == 6 else socket.AF_INET), (host, port)
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, target = found[0]
    return family, (str(target[0]), int(target[1]))
