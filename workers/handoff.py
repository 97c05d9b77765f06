"""The destination's side of a hand-over: one pull from the handshake to the acknowledgement."""

import asyncio
import logging
import math
from dataclasses import dataclass

import grpc

from kvstore.addresses import parse_address
from kvstore.data_plane import connect
from kvstore.errors import TransferCorrupted, TransferInterrupted, TransferRefused
from kvstore.transfer import (
    TICKET_BYTES,
    BlockMemory,
    Incoming,
    Received,
    max_keep_alives,
    receive_transfer,
    send_ticket,
    staging_bytes,
)
from protos import kv_pb2, kv_pb2_grpc
from workers.channels import Channels
from workers.errors import PullCorrupted, PullError, PullInterrupted, PullRefused
from workers.handoff_wire import decode_handoff, layout_to_wire
from workers.raw_blocks import FinitePages
from workers.request import Handoff, KvSource
from workers.step import Pull

MAX_IDLE_CHANNELS = 64
NUM_RELEASE_TRIES = 2
MAX_PENDING_RELEASES = 256
# The source has answered and said no; asking again would not help.
REFUSALS = frozenset(
    {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PullTimeouts:
    total_s: float  # of the whole pull, the prefill included
    handshake_s: float = 5.0  # gRPC Pull; longer than a source waits for a request that is not submitted yet
    connect_s: float = 3.0
    idle_s: float = 5.0  # without a byte; a source that computes sends keep-alives every second
    release_s: float = 2.0

    def __post_init__(self) -> None:
        for name in ("handshake_s", "connect_s", "idle_s", "total_s", "release_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class Puller:
    """Fetches prompts' KV from other workers into `memory`, at most `max_concurrent_pulls` at a time.

    After a task inside `pull` was cancelled and awaited nobody writes to its pages. End all pulls, then `close`.
    """

    def __init__(
        self,
        memory: BlockMemory,
        *,
        model_fingerprint: bytes,
        timeouts: PullTimeouts,
        max_concurrent_pulls: int = 32,
    ) -> None:
        self._memory = FinitePages(memory)
        self._model_fingerprint = model_fingerprint
        self._timeouts = timeouts
        self._slots = asyncio.Semaphore(max_concurrent_pulls)
        self._channels = Channels(max_idle=MAX_IDLE_CHANNELS)
        self._releases: set[asyncio.Task[None]] = set()

    @property
    def num_pending_releases(self) -> int:
        return len(self._releases)

    async def pull(self, pull: Pull) -> Handoff:
        """Fills the pages of `pull` from `first_block` on and returns the request's state.

        Raises PullRefused, PullInterrupted or PullCorrupted; the pages then hold nothing of use. Either way the
        source is told in the background that we want no more. A cancelled pull tells it nothing: whoever aborts
        the request does. Nor does that of a request that runs there: `release` says that it runs here now.
        """
        source = pull.request.kv_source
        assert source is not None, f"request {pull.request.request_id} has no source to pull from"
        async with self._slots:
            try:
                handoff = await self._fetch_in_time(pull, source)
            except PullError:
                # Of a request that runs there a release would say that we have it;
                # that the connection ends says enough.
                if not source.is_live:
                    self._release_soon(source)
                raise
        if not source.is_live:
            self._release_soon(source)
        return handoff

    def release(self, source: KvSource) -> None:
        """Tells the source in the background that a request that ran there runs here now."""
        self._release_soon(source)

    async def close(self) -> None:
        """Gives up releases that are still on their way: their leases run out by themselves."""
        releases = tuple(self._releases)
        for task in releases:
            task.cancel()
        await asyncio.gather(*releases, return_exceptions=True)
        await self._channels.close()

    async def _fetch_in_time(self, pull: Pull, source: KvSource) -> Handoff:
        try:
            async with asyncio.timeout(self._timeouts.total_s):
                return await self._fetch(pull, source)
        except TimeoutError as error:
            raise PullInterrupted(
                f"{source.worker_id} did not hand over {source.request_id} in {self._timeouts.total_s:g} s"
            ) from error

    async def _fetch(self, pull: Pull, source: KvSource) -> Handoff:
        reply = await self._shake_hands(pull, source)
        if reply.num_blocks != len(pull.page_ids):
            raise PullRefused(
                f"{source.worker_id} has {reply.num_blocks} blocks, we want {len(pull.page_ids)}"
            )
        if len(reply.ticket) != TICKET_BYTES:
            raise PullCorrupted(f"ticket of {len(reply.ticket)} bytes, must be {TICKET_BYTES}")
        try:
            received = await self._receive(pull, reply)
        except TransferRefused as error:
            raise PullRefused(str(error)) from error
        except TransferInterrupted as error:
            raise PullInterrupted(str(error)) from error
        except TransferCorrupted as error:
            raise PullCorrupted(str(error)) from error
        handoff = decode_handoff(received.state)
        self._check(handoff, pull, num_blocks=received.num_blocks)
        return handoff

    async def _shake_hands(self, pull: Pull, source: KvSource) -> kv_pb2.PullReply:
        request = kv_pb2.PullRequest(
            request_id=source.request_id,
            source_epoch=source.epoch,
            model_fingerprint=self._model_fingerprint,
            layout=layout_to_wire(self._memory.layout),
            first_block=pull.first_block,
            num_pages=len(pull.page_ids) if source.is_live else 0,
        )
        async with self._channels.use(source.control_address) as channel:
            stub = kv_pb2_grpc.KvTransferStub(channel)
            try:
                return await stub.Pull(request, timeout=self._timeouts.handshake_s)
            except grpc.aio.AioRpcError as error:
                text = f"{source.worker_id} answers {error.code().name}: {error.details()}"
                raise (PullRefused if error.code() in REFUSALS else PullInterrupted)(text) from error

    async def _receive(self, pull: Pull, reply: kv_pb2.PullReply) -> Received:
        try:
            address = parse_address(reply.data_address)
        except ValueError as error:
            raise TransferCorrupted(str(error)) from error
        incoming = Incoming(
            page_ids=pull.page_ids,
            first_block=pull.first_block,
            max_keep_alives=max_keep_alives(timeout_s=self._timeouts.total_s),
            is_open_ended=pull.is_live,
        )
        num_blocks = len(pull.page_ids) - pull.first_block
        staging = memoryview(bytearray(staging_bytes(self._memory.layout, num_blocks=num_blocks)))
        timeouts = self._timeouts
        connection = await connect(address, timeout_s=timeouts.connect_s, idle_timeout_s=timeouts.idle_s)
        with connection:
            await send_ticket(connection, reply.ticket)
            return await receive_transfer(connection, incoming, memory=self._memory, staging=staging)

    def _check(self, handoff: Handoff, pull: Pull, *, num_blocks: int) -> None:
        expected = math.ceil(handoff.num_computed_tokens / self._memory.layout.block_size_tokens)
        if pull.is_live:  # of which we may have cached more than the source has computed
            expected = max(expected, pull.first_block)
        if expected != num_blocks:
            raise PullCorrupted(
                f"{handoff.num_computed_tokens} computed tokens fill {expected} blocks, {num_blocks} came"
            )

    def _release_soon(self, source: KvSource) -> None:
        # In the background: the request can run on at once. One that is lost costs the source its lease time.
        if len(self._releases) >= MAX_PENDING_RELEASES:
            logger.warning("too many releases under way, %s waits for its lease", source.request_id)
            return
        task = asyncio.get_running_loop().create_task(self._release(source))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _release(self, source: KvSource) -> None:
        request = kv_pb2.ReleaseRequest(request_id=source.request_id, source_epoch=source.epoch)
        async with self._channels.use(source.control_address) as channel:
            stub = kv_pb2_grpc.KvTransferStub(channel)
            for _ in range(NUM_RELEASE_TRIES):
                try:
                    await stub.Release(request, timeout=self._timeouts.release_s)
                    return
                except grpc.aio.AioRpcError as error:
                    if error.code() in REFUSALS:  # another incarnation: the lease is gone with the old one
                        return
                    logger.warning(
                        "release of %s at %s: %s", source.request_id, source.worker_id, error.code()
                    )
