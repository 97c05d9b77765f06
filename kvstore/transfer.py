"""How blocks travel: a ticket, then one layer of a run of blocks per frame, the request's state last.

    puller                         source
    TICKET ────────────────────────▶
          ◀──────── BLOCKS (layer, blocks)   as they are computed, per layer in block order
          ◀──────── KEEP_ALIVE               while there is nothing to send
          ◀──────── STATE | REFUSAL          the last frame

How many blocks there are is known before, or, of a request that moves while it runs, when its state comes.

Everything runs in the thread of the event loop. Pages are read and written only between two awaits: after
`Outgoing.stop` nobody reads them, and after a cancelled `receive_transfer` was awaited nobody writes them.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.data_plane import Connection, FrameBuffer
from kvstore.errors import TransferCorrupted, TransferInterrupted, TransferRefused
from kvstore.frames import MAX_PAYLOAD_BYTES, FrameHeader, FrameKind
from kvstore.layout import KvLayout

TICKET_BYTES = 16
# A BLOCKS frame carries no more than this, or a single block.
FRAME_PAYLOAD_BYTES = 2**20
# Sources send keep-alives no faster.
MIN_KEEP_ALIVE_S = 0.25
MAX_STATE_BYTES = 2**20
MAX_REFUSAL_BYTES = 1024


class BlockMemory(Protocol):
    """Pages of KV. A block in one layer: its keys [kv head, token, head dim], its values; see `KvLayout`.

    Called in the event loop's thread while the engine's thread may compute on other pages.
    """

    @property
    def layout(self) -> KvLayout: ...

    @property
    def num_pages(self) -> int: ...

    def read(self, *, layer: int, page_ids: Sequence[int], into: memoryview) -> None:
        """Fills `into` (`layout.layer_block_bytes` per page) with the blocks of `page_ids`, in order."""

    def write(self, *, layer: int, page_ids: Sequence[int], data: memoryview) -> None:
        """Copies one block (`layout.layer_block_bytes`) of `data` to each of `page_ids`, in order."""


class Outgoing:
    """What a source has computed so far of a request that somebody may pull. Pure bookkeeping."""

    def __init__(self, *, num_layers: int, num_blocks: int) -> None:
        self.num_blocks = num_blocks  # of a request that moves while it runs: at most, until it is finished
        self.page_ids: tuple[int, ...] = ()
        self.state: bytes | None = None
        self.refusal: str | None = None
        self._num_layers = num_layers
        self._num_ready = 0
        self._running = (0, 0)  # (layers, blocks): in that many first layers, that many first blocks
        self._changed = asyncio.Event()

    def ready_blocks(self, layer: int) -> int:
        """The blocks before this one may be read in `layer`."""
        num_layers, num_blocks = self._running
        return max(self._num_ready, num_blocks) if layer < num_layers else self._num_ready

    def advance(self, *, page_ids: Sequence[int], num_blocks: int, num_layers: int | None = None) -> None:
        """The first `num_blocks` blocks, in `page_ids`, are computed in all or the first `num_layers` layers.

        Without `num_layers` the count may shrink: a preempted request lost its pages and computes them anew.
        """
        num_pages_read = num_blocks if num_layers is None else max(num_blocks, self._num_ready)
        if not 0 <= num_blocks <= self.num_blocks or num_pages_read > len(page_ids):
            raise ValueError(
                f"{num_blocks} blocks ready, of {self.num_blocks} in all with {len(page_ids)} pages"
            )
        if num_layers is not None and not 0 <= num_layers <= self._num_layers:
            raise ValueError(f"{num_layers} layers ready, the model has {self._num_layers}")
        self.page_ids = tuple(page_ids)
        if num_layers is None:
            self._num_ready, self._running = num_blocks, (0, 0)
        else:
            self._running = (num_layers, num_blocks)
        self._notify()

    def finish_early(self, state: bytes) -> None:
        """Nothing more is computed; `state` is sent after the blocks that are ready."""
        self.num_blocks = self._num_ready
        self.finish(state)

    def finish(self, state: bytes) -> None:
        """Everything is computed; `state` is sent after the last block."""
        if self._num_ready != self.num_blocks:
            raise ValueError(f"finished with {self._num_ready} of {self.num_blocks} blocks ready")
        if len(state) > MAX_STATE_BYTES:
            raise ValueError(f"state is {len(state)} bytes, at most {MAX_STATE_BYTES} can be sent")
        self.state = state
        self._notify()

    def stop(self, reason: str) -> None:
        """No page is read after this returns; a connected puller is told `reason`."""
        self.refusal = reason
        self._notify()

    async def changed(self, *, timeout_s: float) -> bool:
        """Waits for the next call of a method above. False if there was none for `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sender:
    """The source's side of one connection after its ticket was accepted."""

    connection: Connection
    memory: BlockMemory
    outgoing: Outgoing
    first_block: int
    keep_alive_s: float
    on_progress: Callable[[], None]  # called after every frame of blocks or state that was taken,
    on_caught_up: Callable[[], None] = lambda: (
        None
    )  # and whenever all that is ready was sent, and more is to come

    async def run(self, buffer: FrameBuffer) -> None:
        """Sends everything. Raises TransferInterrupted if the puller is gone, TransferRefused if we stop."""
        num_sent = [self.first_block] * self.memory.layout.num_layers
        while self.outgoing.refusal is None:
            header = self._next_blocks(num_sent, capacity_bytes=buffer.capacity_bytes)
            if header is not None:
                self._read(header, buffer)
                await self.connection.send(header, buffer)
                num_sent[header.layer] += header.num_blocks
                self.on_progress()
            elif self.outgoing.state is not None:
                await send_payload(self.connection, FrameKind.STATE, self.outgoing.state)
                self.on_progress()
                return
            else:
                self.on_caught_up()
                if not await self.outgoing.changed(timeout_s=self.keep_alive_s):
                    await send_payload(self.connection, FrameKind.KEEP_ALIVE, b"")
        await refuse(self.connection, self.outgoing.refusal)
        raise TransferRefused(self.outgoing.refusal)

    def _next_blocks(self, num_sent: Sequence[int], *, capacity_bytes: int) -> FrameHeader | None:
        block_bytes = self.memory.layout.layer_block_bytes
        for layer, first_block in enumerate(num_sent):
            num_blocks = min(self.outgoing.ready_blocks(layer) - first_block, capacity_bytes // block_bytes)
            if num_blocks > 0:
                return FrameHeader(
                    kind=FrameKind.BLOCKS,
                    layer=layer,
                    first_block=first_block,
                    num_blocks=num_blocks,
                    payload_bytes=num_blocks * block_bytes,
                )
        return None

    def _read(self, header: FrameHeader, buffer: FrameBuffer) -> None:
        pages = self.outgoing.page_ids[header.first_block : header.first_block + header.num_blocks]
        self.memory.read(layer=header.layer, page_ids=pages, into=buffer.payload(header.payload_bytes))


@dataclass(frozen=True, kw_only=True, slots=True)
class Incoming:
    """What a puller expects: the blocks from `first_block` on. `page_ids` has a page for every block."""

    page_ids: Sequence[int]
    first_block: int
    max_keep_alives: int  # a source that sends more than this keeps us busy for nothing
    is_open_ended: bool = False  # not every page gets a block: the state says how many do

    def __post_init__(self) -> None:
        if not 0 <= self.first_block <= len(self.page_ids):
            raise ValueError(f"first_block {self.first_block} is outside of {len(self.page_ids)} blocks")


@dataclass(frozen=True, slots=True)
class Received:
    state: bytes  # the payload of the state frame
    num_blocks: int  # in pages now, those before `first_block` included


async def receive_transfer(
    connection: Connection, incoming: Incoming, *, memory: BlockMemory, staging: memoryview
) -> Received:
    """Writes all expected blocks to `memory`.

    Each layer's blocks must come in order, each exactly once. `staging` holds one frame (`staging_bytes`).
    Raises TransferRefused, TransferInterrupted or TransferCorrupted; what was written until then is garbage.
    """
    num_received = [incoming.first_block] * memory.layout.num_layers
    num_keep_alives = 0
    while True:
        header = await connection.receive_header()
        match header.kind:
            case FrameKind.BLOCKS:
                _check_blocks(header, num_received, incoming=incoming, layout=memory.layout)
                _check_size(header, max_bytes=len(staging))
                payload = staging[: header.payload_bytes]
                await connection.receive_payload(header, into=payload)
                last = header.first_block + header.num_blocks
                pages = incoming.page_ids[header.first_block : last]
                memory.write(layer=header.layer, page_ids=pages, data=payload)
                num_received[header.layer] = last
            case FrameKind.STATE:
                num_blocks = _check_complete(num_received, incoming=incoming)
                state = await receive_bytes(connection, header, max_bytes=MAX_STATE_BYTES)
                return Received(state, num_blocks)
            case FrameKind.KEEP_ALIVE:
                await receive_bytes(connection, header, max_bytes=0)
                num_keep_alives += 1
                if num_keep_alives > incoming.max_keep_alives:
                    raise TransferCorrupted(f"{connection.peer} sent {num_keep_alives} keep-alives")
            case FrameKind.REFUSAL:
                reason = await receive_bytes(connection, header, max_bytes=MAX_REFUSAL_BYTES)
                raise TransferRefused(f"{connection.peer} refuses: {reason.decode(errors='replace')}")
            case FrameKind.TICKET | FrameKind.WANT | FrameKind.CHUNK:
                raise TransferCorrupted(f"{connection.peer} sent {header.kind.name} in a hand-over")


def _check_blocks(
    header: FrameHeader, num_received: Sequence[int], *, incoming: Incoming, layout: KvLayout
) -> None:
    if header.layer >= layout.num_layers:
        raise TransferCorrupted(f"blocks of layer {header.layer}, the model has {layout.num_layers}")
    expected = num_received[header.layer]
    if header.first_block != expected:
        raise TransferCorrupted(
            f"layer {header.layer} goes on with block {header.first_block}, expected {expected}"
        )
    if not 1 <= header.num_blocks <= len(incoming.page_ids) - expected:
        raise TransferCorrupted(
            f"{header.num_blocks} blocks from {expected} on, the prompt has {len(incoming.page_ids)}"
        )
    if header.payload_bytes != header.num_blocks * layout.layer_block_bytes:
        raise TransferCorrupted(
            f"{header.num_blocks} blocks in {header.payload_bytes} bytes, each has {layout.layer_block_bytes}"
        )


def _check_complete(num_received: Sequence[int], *, incoming: Incoming) -> int:
    num_blocks = num_received[0] if incoming.is_open_ended else len(incoming.page_ids)
    for layer, num_blocks_received in enumerate(num_received):
        if num_blocks_received != num_blocks:
            raise TransferCorrupted(
                f"the state came after {num_blocks_received} of {num_blocks} blocks of layer {layer}"
            )
    return num_blocks


async def send_ticket(connection: Connection, ticket: bytes) -> None:
    """The puller's first frame. Raises TransferInterrupted."""
    await send_payload(connection, FrameKind.TICKET, ticket)


async def receive_ticket(connection: Connection) -> bytes:
    """Raises TransferCorrupted for anything but a ticket frame, TransferInterrupted."""
    header = await connection.receive_header()
    if header.kind is not FrameKind.TICKET or header.payload_bytes != TICKET_BYTES:
        raise TransferCorrupted(
            f"{connection.peer} began with {header.kind.name} of {header.payload_bytes} bytes, "
            f"must be TICKET of {TICKET_BYTES}"
        )
    return await receive_bytes(connection, header, max_bytes=TICKET_BYTES)


async def refuse(connection: Connection, reason: str) -> None:
    """Tells the puller why it gets nothing more. A puller that is gone already does not matter."""
    try:
        await send_payload(connection, FrameKind.REFUSAL, reason.encode()[:MAX_REFUSAL_BYTES])
    except TransferInterrupted:
        return


async def send_payload(connection: Connection, kind: FrameKind, payload: bytes) -> None:
    """Sends a small frame. Raises TransferInterrupted."""
    buffer = FrameBuffer(len(payload))
    buffer.payload(len(payload))[:] = payload
    await connection.send(FrameHeader(kind=kind, payload_bytes=len(payload)), buffer)


async def receive_bytes(connection: Connection, header: FrameHeader, *, max_bytes: int) -> bytes:
    """The payload of a small frame. Raises TransferCorrupted if it announces more than `max_bytes`."""
    _check_size(header, max_bytes=max_bytes)
    payload = bytearray(header.payload_bytes)
    await connection.receive_payload(header, into=memoryview(payload))
    return bytes(payload)


def _check_size(header: FrameHeader, *, max_bytes: int) -> None:
    if header.payload_bytes > max_bytes:
        raise TransferCorrupted(
            f"a {header.kind.name} frame of {header.payload_bytes} bytes, allowed are {max_bytes}"
        )


def staging_bytes(layout: KvLayout, *, num_blocks: int) -> int:
    """What the frames of a transfer carry at most. Raises ValueError for a block that fits no frame."""
    if layout.layer_block_bytes > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a block of {layout.layer_block_bytes} bytes per layer exceeds {MAX_PAYLOAD_BYTES}")
    per_frame = max(1, FRAME_PAYLOAD_BYTES // layout.layer_block_bytes)
    return min(per_frame, max(1, num_blocks)) * layout.layer_block_bytes


def max_keep_alives(*, timeout_s: float) -> int:
    """What an honest source may send in `timeout_s`."""
    return math.ceil(timeout_s / MIN_KEEP_ALIVE_S) + 1
