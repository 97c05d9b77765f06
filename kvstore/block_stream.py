"""How blocks travel that are asked for by key: a ticket, then for each part that is wanted one chunk.

    puller                         source
    TICKET ────────────────────────▶       names the chain's blocks
    WANT (level, blocks) ──────────▶       at most MAX_OUTSTANDING_WANTS unanswered
          ◀──────── KEEP_ALIVE             while the source reads its disk or encodes
          ◀──────── CHUNK (level, blocks)  in the order of the wants, each exactly what was asked for
          ◀──────── REFUSAL                the last frame, if the source cannot go on

A chunk of level 0 is its blocks as they lie in memory, one after another; of any other level one chunk of the
codec. The puller ends the stream by closing the connection.
"""

import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from kvstore.data_plane import Connection, FrameBuffer, SealedFrame
from kvstore.errors import TransferCorrupted, TransferRefused
from kvstore.frames import MAX_CHUNK_BYTES, FrameHeader, FrameKind
from kvstore.transfer import MAX_REFUSAL_BYTES, receive_bytes

RAW_LEVEL = 0
MAX_OUTSTANDING_WANTS = 4
CHUNK_BLOCKS = 16
# A coded chunk of a block or two may be larger than the blocks: it brings its own tables.
MAX_CODED_OVERHEAD_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Want:
    """A part of the blocks that a ticket is for."""

    first_block: int
    num_blocks: int
    level: int


def max_blocks_per_want(*, block_bytes: int) -> int:
    """Raises ValueError for a block that fits no frame."""
    if block_bytes > MAX_CHUNK_BYTES:
        raise ValueError(f"a block of {block_bytes} bytes exceeds {MAX_CHUNK_BYTES}")
    return MAX_CHUNK_BYTES // block_bytes


def chunk_blocks(*, block_bytes: int) -> int:
    """How many blocks travel well together: a chunk's overhead is small then, and its delay too."""
    return min(CHUNK_BLOCKS, max_blocks_per_want(block_bytes=block_bytes))


# The source's side.


async def receive_want(connection: Connection, *, num_blocks: int, block_bytes: int) -> Want:
    """The next want for a ticket of `num_blocks` blocks. Raises TransferCorrupted, TransferInterrupted."""
    header = await connection.receive_header()
    if header.kind is not FrameKind.WANT:
        raise TransferCorrupted(f"{connection.peer} sent {header.kind.name}, pullers send WANT")
    await receive_bytes(connection, header, max_bytes=0)
    most = max_blocks_per_want(block_bytes=block_bytes)
    if not 1 <= header.num_blocks <= min(most, num_blocks - header.first_block):
        raise TransferCorrupted(
            f"{connection.peer} wants {header.num_blocks} blocks from {header.first_block} on, "
            f"the ticket is for {num_blocks} and a chunk has at most {most}"
        )
    return Want(first_block=header.first_block, num_blocks=header.num_blocks, level=header.layer)


def seal_chunk(want: Want, payload: memoryview) -> SealedFrame:
    """To be called in a thread. Raises ValueError for a payload that fits no frame."""
    return SealedFrame.seal(_header(FrameKind.CHUNK, want, payload_bytes=len(payload)), payload)


# The puller's side.


class ChunkStream:
    """Sends wants and receives what they ask for. Close the connection to end it."""

    def __init__(
        self, connection: Connection, *, num_blocks: int, block_bytes: int, max_keep_alives: int
    ) -> None:
        self._connection = connection
        self._num_blocks = num_blocks
        self._block_bytes = block_bytes
        self._max_keep_alives = max_keep_alives  # for one chunk
        self.first_byte_s = 0.0  # when the last chunk began to come, by time.monotonic
        self._outstanding: deque[Want] = deque()

    @property
    def num_outstanding(self) -> int:
        return len(self._outstanding)

    async def want(self, want: Want) -> None:
        """Raises ValueError for what the source would refuse, TransferInterrupted."""
        most = min(max_blocks_per_want(block_bytes=self._block_bytes), self._num_blocks - want.first_block)
        if want.first_block < 0 or not 1 <= want.num_blocks <= most or want.level < 0:
            raise ValueError(f"{want} is not within {self._num_blocks} blocks of {self._block_bytes} bytes")
        if len(self._outstanding) >= MAX_OUTSTANDING_WANTS:
            raise ValueError(f"{len(self._outstanding)} wants are unanswered, more are not allowed")
        self._outstanding.append(want)
        await self._connection.send(_header(FrameKind.WANT, want, payload_bytes=0), FrameBuffer(0))

    async def receive(self) -> tuple[Want, memoryview]:
        """What the oldest want asked for, in memory of its own: it may be decoded while the next one comes.

        Raises TransferRefused, TransferInterrupted or TransferCorrupted.
        """
        if not self._outstanding:
            raise ValueError("nothing was wanted")
        expected = self._outstanding[0]
        num_keep_alives = 0
        while True:
            header = await self._connection.receive_header()
            match header.kind:
                case FrameKind.CHUNK:
                    self.first_byte_s = time.monotonic()
                    self._check(header, expected)
                    # Not a bytearray: that would write 64 MiB of zeros first.
                    payload = np.empty(header.payload_bytes, np.uint8).data
                    await self._connection.receive_payload(header, into=payload)
                    self._outstanding.popleft()
                    return expected, payload
                case FrameKind.KEEP_ALIVE:
                    await receive_bytes(self._connection, header, max_bytes=0)
                    num_keep_alives += 1
                    if num_keep_alives > self._max_keep_alives:
                        raise TransferCorrupted(
                            f"{self._connection.peer} sent {num_keep_alives} keep-alives for one chunk"
                        )
                case FrameKind.REFUSAL:
                    reason = await receive_bytes(self._connection, header, max_bytes=MAX_REFUSAL_BYTES)
                    raise TransferRefused(
                        f"{self._connection.peer} refuses: {reason.decode(errors='replace')}"
                    )
                case _:
                    raise TransferCorrupted(
                        f"{self._connection.peer} sent {header.kind.name} in a stream of chunks"
                    )

    def _check(self, header: FrameHeader, expected: Want) -> None:
        found = Want(first_block=header.first_block, num_blocks=header.num_blocks, level=header.layer)
        if found != expected:
            raise TransferCorrupted(f"{self._connection.peer} sent {found}, asked for was {expected}")
        raw_bytes = expected.num_blocks * self._block_bytes
        if expected.level == RAW_LEVEL and header.payload_bytes != raw_bytes:
            raise TransferCorrupted(
                f"{expected.num_blocks} raw blocks in {header.payload_bytes} bytes, must be {raw_bytes}"
            )
        if not 1 <= header.payload_bytes <= raw_bytes + MAX_CODED_OVERHEAD_BYTES:
            raise TransferCorrupted(
                f"a coded chunk of {header.payload_bytes} bytes, its blocks have {raw_bytes}"
            )


def _header(kind: FrameKind, want: Want, *, payload_bytes: int) -> FrameHeader:
    return FrameHeader(
        kind=kind,
        layer=want.level,
        first_block=want.first_block,
        num_blocks=want.num_blocks,
        payload_bytes=payload_bytes,
    )
