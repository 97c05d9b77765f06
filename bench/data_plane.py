"""The data plane against bare sockets and gRPC: blocks between two processes, and round trips.

    python -m bench.data_plane [--quick]

The puller runs here, the source in a process of its own. A pull is the whole transfer protocol: page reads and writes,
staging and checksums at both ends. `raw` is the same number of bytes from one buffer to another on the same loop, the
most such a socket can give; repetitions alternate, so that other load on the machine meets all of them.
"""

import argparse
import asyncio
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe

import grpc
import uvloop

from bench.report import Claim, write_report
from kvstore.addresses import Address, TcpAddress, UnixAddress, parse_address
from kvstore.data_plane import Connection, FrameBuffer, connect
from kvstore.errors import TransferError
from kvstore.frames import FrameHeader, FrameKind
from kvstore.layout import KvLayout
from kvstore.listener import Listener
from kvstore.transfer import (
    Incoming,
    Outgoing,
    Sender,
    receive_bytes,
    receive_ticket,
    receive_transfer,
    send_payload,
    send_ticket,
    staging_bytes,
)
from workers.engine.kv_pool import KvPool

# 64 KiB a block and layer, as a model with 8 key/value heads of 128 in bfloat16 has.
LAYOUT = KvLayout(num_layers=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")
NUM_BLOCKS = 256
PAGES = tuple(range(NUM_BLOCKS))
PING_BYTES = 64
GRPC_BYTES = 2**20
RAW_BYTES = 2**20
IDLE_TIMEOUT_S = 30.0
TRANSFER, ECHO = bytes(16), bytes([1] * 16)  # the tickets of the two things a source does here
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians of one event loop, by transport."""

    gb_s: dict[str, float]
    trip_us: dict[str, float]


async def serve(pipe: Pipe, directory: str) -> None:
    """The source: sends the blocks of finished prompts, echoes frames, and answers gRPC calls with 1 MiB."""
    memory = KvPool(LAYOUT, num_pages=NUM_BLOCKS)

    async def handle(connection: Connection) -> None:
        ticket = await receive_ticket(connection)
        try:
            await (send_blocks(connection, memory) if ticket == TRANSFER else echo(connection))
        except TransferError:
            return  # the puller has what it wanted

    listeners = [Listener(handle, max_connections=4, idle_timeout_s=IDLE_TIMEOUT_S) for _ in range(2)]
    await listeners[0].start(TcpAddress(host="127.0.0.1", port=0))
    await listeners[1].start(UnixAddress(path=f"{directory}/data.sock"))
    server, port = grpc_server()
    await server.start()
    with socket.create_server(("127.0.0.1", 0)) as raw_socket:
        raw_socket.setblocking(False)
        raw = asyncio.create_task(serve_raw(raw_socket))
        pipe.send([*(str(listener.address) for listener in listeners), port, raw_socket.getsockname()[1]])
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        raw.cancel()
        await asyncio.wait([raw])
    for listener in listeners:
        await listener.close()
    await server.stop(None)


async def serve_raw(listening: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    buffer = memoryview(bytearray(RAW_BYTES))
    while True:
        peer, _ = await loop.sock_accept(listening)
        with peer:
            for _ in range(NUM_BLOCKS * LAYOUT.block_bytes // RAW_BYTES):
                await loop.sock_sendall(peer, buffer)


async def raw_gb_s(port: int) -> float:
    loop = asyncio.get_running_loop()
    buffer = memoryview(bytearray(RAW_BYTES))
    num_bytes = 0
    started_s = time.perf_counter()
    with socket.socket() as peer:
        peer.setblocking(False)
        await loop.sock_connect(peer, ("127.0.0.1", port))
        while num_received := await loop.sock_recv_into(peer, buffer):
            num_bytes += num_received
    return num_bytes / (time.perf_counter() - started_s) / 1e9


async def send_blocks(connection: Connection, memory: KvPool) -> None:
    outgoing = Outgoing(num_layers=LAYOUT.num_layers, num_blocks=NUM_BLOCKS)
    outgoing.advance(page_ids=PAGES, num_blocks=NUM_BLOCKS)
    outgoing.finish(b"")
    sender = Sender(
        connection=connection,
        memory=memory,
        outgoing=outgoing,
        first_block=0,
        keep_alive_s=IDLE_TIMEOUT_S,
        on_progress=lambda: None,
    )
    await sender.run(FrameBuffer(staging_bytes(LAYOUT, num_blocks=NUM_BLOCKS)))


async def echo(connection: Connection) -> None:
    buffer = FrameBuffer(PING_BYTES)
    while True:
        header = await connection.receive_header()
        await connection.receive_payload(header, into=buffer.payload(PING_BYTES))
        await connection.send(FrameHeader(kind=header.kind, payload_bytes=PING_BYTES), buffer)


def grpc_server() -> tuple[grpc.aio.Server, int]:
    async def answer(request: bytes, context: object) -> bytes:
        return request if len(request) == PING_BYTES else bytes(GRPC_BYTES)

    handler = grpc.method_handlers_generic_handler(
        "bench", {"Get": grpc.unary_unary_rpc_method_handler(answer)}
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    return server, server.add_insecure_port("127.0.0.1:0")


async def pull_gb_s(address: Address, memory: KvPool) -> float:
    """One whole prompt of NUM_BLOCKS blocks, in GB/s."""
    staging = memoryview(bytearray(staging_bytes(LAYOUT, num_blocks=NUM_BLOCKS)))
    incoming = Incoming(page_ids=PAGES, first_block=0, max_keep_alives=0)
    started_s = time.perf_counter()
    with await connect(address, timeout_s=5.0, idle_timeout_s=IDLE_TIMEOUT_S) as connection:
        await send_ticket(connection, TRANSFER)
        await receive_transfer(connection, incoming, memory=memory, staging=staging)
    return NUM_BLOCKS * LAYOUT.block_bytes / (time.perf_counter() - started_s) / 1e9


async def round_trips_us(address: Address, *, num_trips: int) -> list[float]:
    with await connect(address, timeout_s=5.0, idle_timeout_s=IDLE_TIMEOUT_S) as connection:
        await send_ticket(connection, ECHO)

        async def trip() -> None:
            await send_payload(connection, FrameKind.STATE, bytes(PING_BYTES))
            await receive_bytes(connection, await connection.receive_header(), max_bytes=PING_BYTES)

        return await timed_us(trip, num_trips)


async def timed_us(call: Callable[[], Awaitable[object]], num_calls: int) -> list[float]:
    times_us = []
    for _ in range(num_calls):
        started_s = time.perf_counter()
        await call()
        times_us.append((time.perf_counter() - started_s) * 1e6)
    return times_us[num_calls // 10 :]  # the first tenth warms up


async def grpc_figures(port: int, *, num_calls: int) -> tuple[float, float]:
    """(GB/s with 1 MiB messages, median round trip in microseconds)"""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        get = channel.unary_unary("/bench/Get", request_serializer=bytes, response_deserializer=bytes)
        large_us = await timed_us(lambda: get(b"", timeout=IDLE_TIMEOUT_S), num_calls)
        small_us = await timed_us(lambda: get(bytes(PING_BYTES), timeout=IDLE_TIMEOUT_S), num_calls)
    return GRPC_BYTES / statistics.median(large_us) / 1e3, statistics.median(small_us)


async def measure(where: tuple[str, str, int, int], *, num_pulls: int, num_trips: int) -> Figures:
    tcp, unix, grpc_port, raw_port = parse_address(where[0]), parse_address(where[1]), *where[2:]
    memory = KvPool(LAYOUT, num_pages=NUM_BLOCKS)
    await pull_gb_s(tcp, memory)  # touches the pages of both ends
    rates: dict[str, list[float]] = {"tcp": [], "unix": [], "raw": []}
    for _ in range(num_pulls):
        rates["tcp"].append(await pull_gb_s(tcp, memory))
        rates["unix"].append(await pull_gb_s(unix, memory))
        rates["raw"].append(await raw_gb_s(raw_port))
    for name, values in rates.items():
        print(f"  {name:5} {min(values):.2f}..{max(values):.2f} GB/s, median {statistics.median(values):.2f}")
    trips = {
        name: await round_trips_us(at, num_trips=num_trips) for name, at in (("tcp", tcp), ("unix", unix))
    }
    for name, values in trips.items():
        p99 = statistics.quantiles(values, n=100)[98]
        print(f"  {name:5} round trip {statistics.median(values):.0f} us, p99 {p99:.0f}")
    grpc_gb_s, grpc_trip_us = await grpc_figures(grpc_port, num_calls=max(50, num_trips // 20))
    print(f"  gRPC  {grpc_gb_s:.2f} GB/s, round trip {grpc_trip_us:.0f} us")
    return Figures(
        gb_s={name: statistics.median(values) for name, values in rates.items()} | {"grpc": grpc_gb_s},
        trip_us={name: statistics.median(values) for name, values in trips.items()} | {"grpc": grpc_trip_us},
    )


def run_source(pipe: Pipe, directory: str, loop_name: str) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
        runner.run(serve(pipe, directory))


def run(loop_name: str, *, num_pulls: int, num_trips: int) -> Figures:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    print(f"{loop_name}: {NUM_BLOCKS} blocks of {LAYOUT.block_bytes / 1024:.0f} KiB a pull")
    with tempfile.TemporaryDirectory() as directory:
        source = context.Process(target=run_source, args=(theirs, directory, loop_name))
        source.start()
        try:
            with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
                return runner.run(measure(ours.recv(), num_pulls=num_pulls, num_trips=num_trips))
        finally:
            ours.send("stop")
            source.join()


def claims_of(name: str, figures: Figures) -> list[Claim]:
    gb_s, trip_us = figures.gb_s, figures.trip_us
    plain = [
        Claim(name=f"{name}_{kind}", value=gb_s[kind], unit="GB/s", aim=2.0, better="higher")
        for kind in ("tcp", "unix")
    ]
    trips = [
        Claim(name=f"{name}_{kind}_round_trip", value=trip_us[kind], unit="us", aim=100.0, better="lower")
        for kind in ("tcp", "unix")
    ]
    ratios = {
        f"{name}_tcp_vs_raw_socket": (gb_s["tcp"] / gb_s["raw"], 0.5),
        f"{name}_tcp_vs_grpc": (gb_s["tcp"] / gb_s["grpc"], 2.0),
        f"{name}_round_trip_vs_grpc": (trip_us["grpc"] / trip_us["tcp"], 4.0),
    }
    return (
        plain
        + trips
        + [
            Claim(name=ratio, value=value, unit="x", aim=aim, better="higher")
            for ratio, (value, aim) in ratios.items()
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    quick = parser.parse_args().quick
    num_pulls, num_trips = (5, 1000) if quick else (25, 10_000)
    found = {name: run(name, num_pulls=num_pulls, num_trips=num_trips) for name in LOOPS}
    claims = [claim for name, figures in found.items() for claim in claims_of(name, figures)]
    write_report("data_plane", claims, keep=not quick)


if __name__ == "__main__":
    main()
