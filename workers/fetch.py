"""The puller's side of a pull by key: blocks that another worker or a store holds, part by part as they are wanted."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from kvstore.addresses import parse_address
from kvstore.block_stream import RAW_LEVEL, ChunkStream, Want
from kvstore.blocks import FORMAT_VERSION, BlockKey
from kvstore.data_plane import Connection, connect
from kvstore.errors import TransferCorrupted, TransferInterrupted, TransferRefused
from kvstore.layout import KvLayout
from kvstore.tiers.tier import Tier
from kvstore.transfer import TICKET_BYTES, max_keep_alives, send_ticket
from protos import kv_pb2, kv_pb2_grpc
from workers.channels import Channels
from workers.errors import PullCorrupted, PullInterrupted, PullRefused
from workers.handoff import MAX_IDLE_CHANNELS, REFUSALS
from workers.handoff_wire import layout_to_wire
from workers.request import KvHolder

# 2^18 tokens; a source takes no more. To check and look up so many that lie on disk holds its event loop for 6 ms.
MAX_KEYS_PER_PULL = 2**14


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchTimeouts:
    total_s: float  # from the handshake to the last chunk
    handshake_s: float = 2.0
    connect_s: float = 2.0
    idle_s: float = 5.0  # without a byte; a source that encodes sends keep-alives

    def __post_init__(self) -> None:
        for name in ("total_s", "handshake_s", "connect_s", "idle_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Consecutive blocks: raw at level 0, else one chunk of the codec."""

    first_block: int
    num_blocks: int
    level: int
    payload: memoryview
    first_byte_s: float  # when it began to come, by time.monotonic: before, the source may have encoded


class Fetch:
    """One open pull. Used by one task; leaving the context closes the connection and ends what the source holds for it.

    Everything raises PullRefused, PullInterrupted or PullCorrupted; nothing more can be had of this fetch then.
    """

    def __init__(
        self,
        connection: Connection,
        stream: ChunkStream,
        *,
        deadline_s: float,
        tiers: tuple[Tier, ...],
        has_same_profile: bool,
    ) -> None:
        self.tiers = tiers
        self.has_same_profile = has_same_profile  # without it only level 0 can be had
        self._connection = connection
        self._stream = stream
        self._deadline_s = deadline_s  # by the event loop's clock

    @property
    def num_blocks(self) -> int:
        """How many leading ones of the keys the source holds."""
        return len(self.tiers)

    async def want(self, *, first_block: int, num_blocks: int, level: int) -> None:
        """Asks for a chunk. At most MAX_OUTSTANDING_WANTS (kvstore.block_stream) may be unanswered."""
        if level > RAW_LEVEL and not self.has_same_profile:
            raise ValueError(f"level {level} needs equal profiles at both ends, level {RAW_LEVEL} does not")
        with _pull_errors():
            async with asyncio.timeout_at(self._deadline_s):
                await self._stream.want(Want(first_block=first_block, num_blocks=num_blocks, level=level))

    async def receive(self) -> Chunk:
        """The chunk that was asked for first."""
        with _pull_errors():
            async with asyncio.timeout_at(self._deadline_s):
                want, payload = await self._stream.receive()
        return Chunk(
            first_block=want.first_block,
            num_blocks=want.num_blocks,
            level=want.level,
            payload=payload,
            first_byte_s=self._stream.first_byte_s,
        )

    def close(self) -> None:
        """Idempotent."""
        self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class BlockFetcher:
    """Opens pulls by key. End all of them, then `close`."""

    def __init__(
        self, *, model_fingerprint: bytes, layout: KvLayout, profile_id: bytes, timeouts: FetchTimeouts
    ) -> None:
        self._model_fingerprint = model_fingerprint
        self._layout = layout
        self._profile_id = profile_id
        self._timeouts = timeouts
        self._channels = Channels(max_idle=MAX_IDLE_CHANNELS)

    @property
    def layout(self) -> KvLayout:
        return self._layout

    async def open(self, holder: KvHolder, keys: Sequence[BlockKey]) -> Fetch:
        """A pull of the leading ones of `keys`, a chain's consecutive blocks, that the holder still has.

        Raises PullRefused (it has none, or does not agree), PullInterrupted or PullCorrupted.
        """
        deadline_s = asyncio.get_running_loop().time() + self._timeouts.total_s
        reply = await self._shake_hands(holder, keys[:MAX_KEYS_PER_PULL])
        tiers = _tiers(reply, num_keys=len(keys))
        with _pull_errors():
            connection = await self._connect(reply)
        stream = ChunkStream(
            connection,
            num_blocks=len(tiers),
            block_bytes=self._layout.block_bytes,
            max_keep_alives=max_keep_alives(timeout_s=self._timeouts.total_s),
        )
        return Fetch(
            connection,
            stream,
            deadline_s=deadline_s,
            tiers=tiers,
            has_same_profile=reply.codec_profile == self._profile_id,
        )

    async def close(self) -> None:
        await self._channels.close()

    async def _shake_hands(self, holder: KvHolder, keys: Sequence[BlockKey]) -> kv_pb2.PullReply:
        request = kv_pb2.PullRequest(
            source_epoch=holder.epoch,
            model_fingerprint=self._model_fingerprint,
            layout=layout_to_wire(self._layout),
            block_keys=b"".join(keys),
            block_format=FORMAT_VERSION,
            codec_profile=self._profile_id,
        )
        async with self._channels.use(holder.control_address) as channel:
            stub = kv_pb2_grpc.KvTransferStub(channel)
            try:
                return await stub.Pull(request, timeout=self._timeouts.handshake_s)
            except grpc.aio.AioRpcError as error:
                text = f"{holder.worker_id} answers {error.code().name}: {error.details()}"
                raise (PullRefused if error.code() in REFUSALS else PullInterrupted)(text) from error

    async def _connect(self, reply: kv_pb2.PullReply) -> Connection:
        try:
            address = parse_address(reply.data_address)
        except ValueError as error:
            raise TransferCorrupted(str(error)) from error
        timeouts = self._timeouts
        connection = await connect(address, timeout_s=timeouts.connect_s, idle_timeout_s=timeouts.idle_s)
        try:
            await send_ticket(connection, reply.ticket)
        except BaseException:
            connection.close()
            raise
        return connection


def _tiers(reply: kv_pb2.PullReply, *, num_keys: int) -> tuple[Tier, ...]:
    """Raises PullCorrupted for a reply that no source of this version would give."""
    if len(reply.ticket) != TICKET_BYTES:
        raise PullCorrupted(f"ticket of {len(reply.ticket)} bytes, must be {TICKET_BYTES}")
    if not 1 <= reply.num_blocks <= num_keys or len(reply.tiers) != reply.num_blocks:
        raise PullCorrupted(
            f"{reply.num_blocks} blocks in {len(reply.tiers)} tiers are held, asked was for {num_keys}"
        )
    try:
        return tuple(map(Tier, reply.tiers))
    except ValueError as error:
        raise PullCorrupted(f"a block is in no tier that we know: {error}") from error


@contextmanager
def _pull_errors() -> Iterator[None]:
    try:
        yield
    except TransferRefused as error:
        raise PullRefused(str(error)) from error
    except TransferInterrupted as error:
        raise PullInterrupted(str(error)) from error
    except TransferCorrupted as error:
        raise PullCorrupted(str(error)) from error
    except TimeoutError as error:
        raise PullInterrupted("the pull took longer than all of it may take") from error
