"""Wants and chunks over real sockets: honest sources, lying sources, lying pullers."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator

import pytest

from kvstore.block_stream import (
    MAX_CODED_OVERHEAD_BYTES,
    MAX_OUTSTANDING_WANTS,
    ChunkStream,
    Want,
    chunk_blocks,
    max_blocks_per_want,
    receive_want,
    seal_chunk,
)
from kvstore.data_plane import Connection, FrameBuffer, SealedFrame
from kvstore.errors import TransferCorrupted, TransferInterrupted, TransferRefused
from kvstore.frames import MAX_CHUNK_BYTES, FrameHeader, FrameKind
from kvstore.transfer import refuse, send_payload

BLOCK_BYTES = 96
NUM_BLOCKS = 7
SOON_S = 5.0
WANT = Want(first_block=2, num_blocks=3, level=0)
RAW = bytes(range(96)) * 3

pytestmark = pytest.mark.usefixtures("nothing_is_left")


class Ends:
    """A source and a puller, joined by a socket pair."""

    def __init__(self, *, idle_timeout_s: float, block_bytes: int) -> None:
        ours, theirs = socket.socketpair()
        self.source = Connection(ours, peer="the puller", idle_timeout_s=idle_timeout_s)
        self.puller = Connection(theirs, peer="the source", idle_timeout_s=idle_timeout_s)
        self.stream = ChunkStream(
            self.puller, num_blocks=NUM_BLOCKS, block_bytes=block_bytes, max_keep_alives=3
        )

    async def receive_want(self) -> Want:
        return await receive_want(self.source, num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES)

    def close(self) -> None:
        self.source.close()
        self.puller.close()


@contextlib.contextmanager
def ends(*, idle_timeout_s: float = SOON_S, block_bytes: int = BLOCK_BYTES) -> Iterator[Ends]:
    with contextlib.closing(Ends(idle_timeout_s=idle_timeout_s, block_bytes=block_bytes)) as both:
        yield both


async def send_chunk(connection: Connection, want: Want, payload: bytes) -> None:
    await connection.send_sealed(seal_chunk(want, memoryview(payload)))


async def test_a_chunk_arrives_as_it_was_sent() -> None:
    with ends() as both:
        await both.stream.want(WANT)
        assert await both.receive_want() == WANT
        await send_chunk(both.source, WANT, RAW)
        want, payload = await both.stream.receive()
        assert (want, bytes(payload)) == (WANT, RAW)
        assert both.stream.num_outstanding == 0


async def test_wants_are_answered_in_their_order_and_only_so_many_may_wait() -> None:
    wants = [Want(first_block=start, num_blocks=1, level=1) for start in range(MAX_OUTSTANDING_WANTS)]
    with ends() as both:
        for want in wants:
            await both.stream.want(want)
        with pytest.raises(ValueError, match="unanswered"):
            await both.stream.want(wants[0])
        for want in wants:
            assert await both.receive_want() == want
            await send_chunk(both.source, want, bytes([want.first_block + 1]) * 10)
        for want in wants:
            found, payload = await both.stream.receive()
            assert (found, bytes(payload)) == (want, bytes([want.first_block + 1]) * 10)


async def test_the_largest_chunk_passes_and_both_ends_may_talk_at_once() -> None:
    block_bytes = MAX_CHUNK_BYTES // 4
    want = Want(first_block=0, num_blocks=4, level=0)
    payload = bytes(range(256)) * (MAX_CHUNK_BYTES // 256)
    with ends(block_bytes=block_bytes) as both:
        await both.stream.want(want)
        sending = asyncio.create_task(send_chunk(both.source, want, payload))
        await both.stream.want(Want(first_block=5, num_blocks=1, level=2))
        _, found = await both.stream.receive()
        await sending
        assert found == payload
        levels = [
            (await receive_want(both.source, num_blocks=NUM_BLOCKS, block_bytes=block_bytes)).level
            for _ in range(2)
        ]
        assert levels == [0, 2]


async def test_keep_alives_hold_a_chunk_back_but_not_forever() -> None:
    with ends() as both:
        await both.stream.want(WANT)
        for _ in range(3):
            await send_payload(both.source, FrameKind.KEEP_ALIVE, b"")
        await send_chunk(both.source, WANT, RAW)
        assert (await both.stream.receive())[0] == WANT

        await both.stream.want(WANT)
        for _ in range(4):
            await send_payload(both.source, FrameKind.KEEP_ALIVE, b"")
        with pytest.raises(TransferCorrupted, match="4 keep-alives"):
            await both.stream.receive()


async def test_a_refusal_says_why() -> None:
    with ends() as both:
        await both.stream.want(WANT)
        await refuse(both.source, "block 2 is not held any more")
        with pytest.raises(TransferRefused, match="block 2 is not held any more"):
            await both.stream.receive()


Lie = Callable[[Connection], Awaitable[None]]


def _chunk(*, payload: bytes = RAW, **fields: int) -> Lie:
    facts = {"first_block": WANT.first_block, "num_blocks": WANT.num_blocks, "level": WANT.level} | fields
    return lambda connection: send_chunk(connection, Want(**facts), payload)


async def _garbled(connection: Connection) -> None:
    payload = bytearray(RAW)
    frame = seal_chunk(WANT, memoryview(payload))
    payload[100] ^= 1
    await connection.send_sealed(frame)


async def _endless(connection: Connection) -> None:
    header = FrameHeader(kind=FrameKind.CHUNK, first_block=2, num_blocks=3, payload_bytes=MAX_CHUNK_BYTES)
    frame = SealedFrame.seal(header, memoryview(bytes(MAX_CHUNK_BYTES)))
    await connection.send_sealed(SealedFrame(frame.header, frame.payload[:1000]))


LIES: dict[str, tuple[Lie, str]] = {
    "another first block": (_chunk(first_block=1), "asked for was"),
    "another number of blocks": (_chunk(num_blocks=2), "asked for was"),
    "another level": (_chunk(level=1), "asked for was"),
    "too short": (_chunk(payload=RAW[:-1]), "must be 288"),
    "too long": (_chunk(payload=RAW + b"x"), "must be 288"),
    "endless": (_endless, "must be 288"),
    "a flipped bit": (_garbled, "checksum"),
    "a want": (
        lambda connection: connection.send(FrameHeader(kind=FrameKind.WANT), FrameBuffer(0)),
        "sent WANT",
    ),
    "a state": (lambda connection: send_payload(connection, FrameKind.STATE, b"x"), "sent STATE"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
async def test_whatever_was_not_asked_for_is_refused(name: str) -> None:
    lie, message = LIES[name]
    with ends() as both:
        await both.stream.want(WANT)
        await lie(both.source)
        with pytest.raises(TransferCorrupted, match=message):
            await both.stream.receive()


async def test_a_coded_chunk_may_be_larger_than_its_blocks_but_not_by_much() -> None:
    want = Want(first_block=0, num_blocks=1, level=1)
    allowed = BLOCK_BYTES + MAX_CODED_OVERHEAD_BYTES
    with ends() as both:
        for num_bytes in (allowed, allowed + 1):
            await both.stream.want(want)
            sending = asyncio.create_task(send_chunk(both.source, want, bytes(num_bytes)))
            if num_bytes == allowed:
                await both.stream.receive()
            else:
                with pytest.raises(TransferCorrupted, match="its blocks have 96"):
                    await both.stream.receive()
                both.puller.close()
            with contextlib.suppress(TransferInterrupted):
                await sending


async def test_a_source_that_falls_silent_is_given_up() -> None:
    with ends(idle_timeout_s=0.05) as both:
        await both.stream.want(WANT)
        with pytest.raises(TransferInterrupted, match=r"did nothing for 0\.05 s"):
            await both.stream.receive()


async def test_a_source_that_leaves_within_a_chunk_is_noticed() -> None:
    with ends() as both:
        await both.stream.want(WANT)
        await both.receive_want()
        frame = seal_chunk(WANT, memoryview(RAW))
        await both.source.send_sealed(SealedFrame(frame.header, frame.payload[:50]))
        both.source.close()
        with pytest.raises(TransferInterrupted, match="closed the connection"):
            await both.stream.receive()


@pytest.mark.parametrize(
    "header",
    [
        FrameHeader(kind=FrameKind.WANT, first_block=0, num_blocks=0),
        FrameHeader(kind=FrameKind.WANT, first_block=0, num_blocks=NUM_BLOCKS + 1),
        FrameHeader(kind=FrameKind.WANT, first_block=NUM_BLOCKS, num_blocks=1),
        FrameHeader(kind=FrameKind.WANT, first_block=2**32 - 1, num_blocks=2**32 - 1),
        FrameHeader(kind=FrameKind.KEEP_ALIVE),
    ],
)
async def test_a_want_outside_of_the_ticket_is_refused(header: FrameHeader) -> None:
    with ends() as both:
        await both.puller.send(header, FrameBuffer(0))
        with pytest.raises(TransferCorrupted):
            await both.receive_want()


async def test_a_want_with_a_payload_is_refused() -> None:
    with ends() as both:
        buffer = FrameBuffer(3)
        await both.puller.send(
            FrameHeader(kind=FrameKind.WANT, first_block=0, num_blocks=1, payload_bytes=3), buffer
        )
        with pytest.raises(TransferCorrupted, match="WANT frame of 3 bytes"):
            await both.receive_want()


@pytest.mark.parametrize(
    "want",
    [
        Want(first_block=-1, num_blocks=1, level=0),
        Want(first_block=0, num_blocks=0, level=0),
        Want(first_block=5, num_blocks=3, level=0),
        Want(first_block=0, num_blocks=1, level=-1),
    ],
)
async def test_a_puller_wants_nothing_that_cannot_be(want: Want) -> None:
    with ends() as both:
        with pytest.raises(ValueError, match="is not within"):
            await both.stream.want(want)
        with pytest.raises(ValueError, match="nothing was wanted"):
            await both.stream.receive()


def test_a_block_larger_than_a_frame_cannot_travel() -> None:
    assert max_blocks_per_want(block_bytes=MAX_CHUNK_BYTES) == 1
    assert chunk_blocks(block_bytes=5 * 2**20) == 12
    with pytest.raises(ValueError, match="exceeds"):
        max_blocks_per_want(block_bytes=MAX_CHUNK_BYTES + 1)
