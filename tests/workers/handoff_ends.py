"""Both ends of a hand-over with real servers and sockets, and a source that answers what a test wants."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc
import psutil
import torch

from kvstore.addresses import TcpAddress
from kvstore.layout import KvLayout
from kvstore.listener import Handler, Listener
from protos import kv_pb2, kv_pb2_grpc
from workers.agreement import SourceIdentity
from workers.engine.kv_pool import KvPool
from workers.exports import ExportLimits, Exports
from workers.handoff import Puller, PullTimeouts
from workers.handoff_server import ComputingSource, KvTransferService
from workers.reports import ExportProgress
from workers.request import Handoff, KvSource, PageId, Request, RequestId, SamplingParams, SessionId
from workers.step import Pull
from workers.tickets import TicketDesk

LAYOUT = KvLayout(num_layers=3, num_kv_heads=2, head_dim=4, dtype="bfloat16")
FINGERPRINT = b"the model"
EPOCH = 77
ID = RequestId("request-1")
NUM_TOKENS = 100  # seven blocks, the last one partly filled
SOURCE_PAGES = tuple(map(PageId, (9, 2, 5, 11, 0, 3, 7)))
PAGES = tuple(map(PageId, (4, 1, 8, 6, 10, 2, 0)))
HANDOFF = Handoff(num_computed_tokens=NUM_TOKENS, output_token_ids=(42,), num_cached_tokens=16)
SOON_S = 10.0
TIMEOUTS = PullTimeouts(handshake_s=5.0, connect_s=5.0, idle_s=5.0, total_s=30.0, release_s=2.0)


def random_pool(seed: int) -> KvPool:
    pool = KvPool(LAYOUT, num_pages=12)
    pool.pages_LP2GBC.copy_(
        torch.randn(pool.pages_LP2GBC.shape, generator=torch.Generator().manual_seed(seed))
    )
    return pool


class Source:
    """What a prefill worker has around its exports."""

    def __init__(self, *, limits: ExportLimits, max_connections: int = 8) -> None:
        self.pool = random_pool(1)
        self.ended: asyncio.Queue[tuple[str, RequestId]] = asyncio.Queue()
        self.exports = Exports(
            self.pool,
            limits=limits,
            on_released=lambda request_id: self.ended.put_nowait(("released", request_id)),
            on_expired=lambda request_id: self.ended.put_nowait(("expired", request_id)),
        )
        self.listener = Listener(
            TicketDesk([self.exports]).serve, max_connections=max_connections, idle_timeout_s=SOON_S
        )
        self.server = grpc.aio.server()
        self.control_address = ""

    async def start(self) -> None:
        await self.listener.start(TcpAddress(host="127.0.0.1", port=0))
        identity = SourceIdentity(
            epoch=EPOCH,
            model_fingerprint=FINGERPRINT,
            layout=LAYOUT,
            data_address=str(self.listener.address),
        )
        service = KvTransferService(
            identity=identity, computing=ComputingSource(exports=self.exports, open_move=self.open_move)
        )
        kv_pb2_grpc.add_KvTransferServicer_to_server(service, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.control_address = f"127.0.0.1:{port}"

    async def close(self) -> None:
        self.exports.close_all()
        await self.listener.close()
        await self.server.stop(None)

    def open_move(self, request_id: RequestId, num_pages: int) -> None:
        self.exports.open_live(request_id, max_blocks=num_pages)

    def open(self) -> None:
        self.exports.open(ID, num_prompt_tokens=NUM_TOKENS)

    def progress(self, num_tokens: int, *, handoff: Handoff | None = None) -> None:
        self.exports.progress(
            ExportProgress(
                request_id=ID, page_ids=SOURCE_PAGES, num_computed_tokens=num_tokens, handoff=handoff
            )
        )

    def finish(self, handoff: Handoff = HANDOFF) -> None:
        self.progress(NUM_TOKENS, handoff=handoff)

    async def next_end(self) -> tuple[str, RequestId]:
        async with asyncio.timeout(SOON_S):
            return await self.ended.get()


def make_puller(
    pool: KvPool, *, fingerprint: bytes = FINGERPRINT, timeouts: PullTimeouts = TIMEOUTS, num_slots: int = 4
) -> Puller:
    return Puller(
        pool,
        model_fingerprint=fingerprint,
        timeouts=timeouts,
        max_concurrent_pulls=num_slots,
    )


def make_pull(control_address: str, *, epoch: int = EPOCH, first_block: int = 0) -> Pull:
    source = KvSource(worker_id="prefill-0", epoch=epoch, control_address=control_address, request_id=ID)
    request = Request(
        request_id=RequestId("ours"),
        session_id=SessionId(1),
        prompt_token_ids=list(range(NUM_TOKENS)),
        sampling=SamplingParams(),
        arrival_s=0.0,
        kv_source=source,
    )
    return Pull(request=request, page_ids=PAGES, first_block=first_block)


def port_of(listener: Listener) -> int:
    address = listener.address
    assert isinstance(address, TcpAddress)
    return address.port


def connections_of(port: int) -> list[str]:
    """Open sockets of this process to or from a port, either end."""
    return [
        str(found)
        for found in psutil.Process().net_connections(kind="tcp")
        if port in {found.laddr and found.laddr.port, found.raddr and found.raddr.port}
    ]


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def running_source(limits: ExportLimits, *, max_connections: int = 8) -> AsyncIterator[Source]:
    """Asserts in the end that nothing of it is left."""
    source = Source(limits=limits, max_connections=max_connections)
    await source.start()
    try:
        yield source
    finally:
        await source.close()
    assert source.listener.num_connections == source.exports.num_open == source.exports.num_leases == 0
    assert connections_of(port_of(source.listener)) == []


def assert_arrived(source: Source, pool: KvPool, *, first_block: int = 0) -> None:
    expected = random_pool(2).pages_LP2GBC
    expected[:, list(PAGES[first_block:])] = source.pool.pages_LP2GBC[:, list(SOURCE_PAGES[first_block:])]
    assert torch.equal(pool.pages_LP2GBC, expected)


def arrived(source: Source, pool: KvPool, *, layer: int, block: int) -> bool:
    ours = pool.pages_LP2GBC[layer, PAGES[block]]
    return torch.equal(ours, source.pool.pages_LP2GBC[layer, SOURCE_PAGES[block]])


class Impostor(kv_pb2_grpc.KvTransferServicer):
    """A source that answers what it is told to, on both planes."""

    def __init__(self, handler: Handler) -> None:
        self.reply = kv_pb2.PullReply(ticket=bytes(16), num_blocks=len(PAGES))
        self.release_failures = 0
        self.num_releases = 0
        self.released = asyncio.Event()
        self.listener = Listener(handler, max_connections=4, idle_timeout_s=SOON_S)
        self.server = grpc.aio.server()
        kv_pb2_grpc.add_KvTransferServicer_to_server(self, self.server)
        self.control_address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    async def Pull(
        self,
        request: kv_pb2.PullRequest,
        context: grpc.aio.ServicerContext[kv_pb2.PullRequest, kv_pb2.PullReply],
    ) -> kv_pb2.PullReply:
        return self.reply

    async def Release(
        self,
        request: kv_pb2.ReleaseRequest,
        context: grpc.aio.ServicerContext[kv_pb2.ReleaseRequest, kv_pb2.ReleaseReply],
    ) -> kv_pb2.ReleaseReply:
        self.num_releases += 1
        if self.num_releases <= self.release_failures:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        self.released.set()
        return kv_pb2.ReleaseReply()

    async def __aenter__(self) -> "Impostor":
        await self.listener.start(TcpAddress(host="127.0.0.1", port=0))
        self.reply.data_address = str(self.listener.address)
        await self.server.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        port = port_of(self.listener)
        await self.listener.close()
        await self.server.stop(None)
        assert connections_of(port) == []
