"""Both ends of a transfer over real sockets: honest sources, lying sources, cancelled pullers."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.data_plane import Connection, FrameBuffer
from kvstore.errors import TransferCorrupted, TransferError, TransferInterrupted, TransferRefused
from kvstore.frames import FrameHeader, FrameKind
from kvstore.layout import KvLayout
from kvstore.transfer import (
    FRAME_PAYLOAD_BYTES,
    Incoming,
    Outgoing,
    Received,
    Sender,
    receive_ticket,
    receive_transfer,
    send_payload,
    send_ticket,
    staging_bytes,
)

LAYOUT = KvLayout(num_layers=3, num_kv_heads=1, head_dim=2, dtype="float32")
NUM_BLOCKS = 7
SOURCE_PAGES = (9, 2, 5, 11, 0, 3, 7)
PAGES = (4, 1, 8, 6, 10, 2, 0)
NUM_PAGES = 12
SOON_S = 5.0

left_clean = pytest.mark.usefixtures("nothing_is_left")


class Memory:
    """Pages of random bytes; remembers which were read."""

    def __init__(self, *, seed: int, layout: KvLayout = LAYOUT, num_pages: int = NUM_PAGES) -> None:
        self.layout = layout
        self.num_pages = num_pages
        shape = (layout.num_layers, num_pages, layout.layer_block_bytes)
        self.pages = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        self.num_reads = 0

    def read(self, *, layer: int, page_ids: Sequence[int], into: memoryview) -> None:
        self.num_reads += 1
        into[:] = memoryview(self.pages[layer, list(page_ids)].reshape(-1))

    def write(self, *, layer: int, page_ids: Sequence[int], data: memoryview) -> None:
        blocks = np.frombuffer(data, np.uint8).reshape(len(page_ids), self.layout.layer_block_bytes)
        self.pages[layer, list(page_ids)] = blocks


class Ends:
    """A source and a puller, joined by a socket pair."""

    def __init__(self, *, first_block: int = 0, idle_timeout_s: float = SOON_S) -> None:
        ours, theirs = socket.socketpair()
        self.source = Memory(seed=1)
        self.target = Memory(seed=2)
        self.untouched = self.target.pages.copy()
        self.first_block = first_block
        self.outgoing = Outgoing(num_layers=LAYOUT.num_layers, num_blocks=NUM_BLOCKS)
        self.sending = Connection(ours, peer="the puller", idle_timeout_s=idle_timeout_s)
        self.receiving = Connection(theirs, peer="the source", idle_timeout_s=idle_timeout_s)
        self.num_progress = 0

    def count_progress(self) -> None:
        self.num_progress += 1

    async def send(self, *, frame_blocks: int = 2, keep_alive_s: float = SOON_S) -> None:
        sender = Sender(
            connection=self.sending,
            memory=self.source,
            outgoing=self.outgoing,
            first_block=self.first_block,
            keep_alive_s=keep_alive_s,
            on_progress=self.count_progress,
        )
        await sender.run(FrameBuffer(frame_blocks * LAYOUT.layer_block_bytes))

    async def receive(self, *, max_keep_alives: int = 3, staging_blocks: int = NUM_BLOCKS) -> Received:
        incoming = Incoming(page_ids=PAGES, first_block=self.first_block, max_keep_alives=max_keep_alives)
        staging = memoryview(bytearray(staging_bytes(LAYOUT, num_blocks=staging_blocks)))
        return await receive_transfer(self.receiving, incoming, memory=self.target, staging=staging)

    def finish(self) -> None:
        self.outgoing.advance(page_ids=SOURCE_PAGES, num_blocks=NUM_BLOCKS)
        self.outgoing.finish(b"state")

    def assert_arrived(self) -> None:
        expected = self.untouched
        expected[:, PAGES[self.first_block :]] = self.source.pages[:, SOURCE_PAGES[self.first_block :]]
        assert np.array_equal(self.target.pages, expected)

    def close(self) -> None:
        self.sending.close()
        self.receiving.close()


@contextlib.contextmanager
def ends(*, first_block: int = 0, idle_timeout_s: float = SOON_S) -> Iterator[Ends]:
    both = Ends(first_block=first_block, idle_timeout_s=idle_timeout_s)
    with contextlib.closing(both):
        yield both


async def turns(num_turns: int) -> None:
    for _ in range(num_turns):
        await asyncio.sleep(0)


@left_clean
async def test_a_finished_prompt_arrives_with_its_state() -> None:
    with ends() as both:
        both.finish()
        _, received = await asyncio.gather(both.send(), both.receive())
        assert received.state == b"state"
        assert both.num_progress == LAYOUT.num_layers * 4 + 1  # seven blocks, two in a frame; the state
        both.assert_arrived()


@left_clean
async def test_with_all_blocks_cached_only_the_state_travels() -> None:
    with ends(first_block=NUM_BLOCKS) as both:
        both.finish()
        _, received = await asyncio.gather(both.send(), both.receive())
        assert (received.state, both.source.num_reads) == (b"state", 0)
        both.assert_arrived()


@left_clean
async def test_ready_blocks_travel_while_later_ones_are_computed() -> None:
    with ends() as both:
        sending, receiving = asyncio.create_task(both.send()), asyncio.create_task(both.receive())
        both.outgoing.advance(page_ids=SOURCE_PAGES[:3], num_blocks=3)
        await turns(50)
        expected = both.untouched.copy()
        expected[:, PAGES[:3]] = both.source.pages[:, SOURCE_PAGES[:3]]
        assert np.array_equal(both.target.pages, expected)

        both.outgoing.advance(page_ids=SOURCE_PAGES, num_blocks=NUM_BLOCKS, num_layers=2)
        await turns(50)
        expected[:2, PAGES] = both.source.pages[:2, SOURCE_PAGES]
        assert np.array_equal(both.target.pages, expected)

        both.finish()
        await asyncio.gather(sending, receiving)
        both.assert_arrived()


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[int, int | None]]:
    """Readiness as an engine reports it: (blocks, layers), with steps back to nothing after preemptions."""
    steps: list[tuple[int, int | None]] = []
    for _ in range(draw(st.integers(0, 3))):
        done = 0
        while done < NUM_BLOCKS and draw(st.booleans()):
            upto = draw(st.integers(done, NUM_BLOCKS))
            steps += [(upto, layers) for layers in range(1, draw(st.integers(1, LAYOUT.num_layers + 1)))]
            steps.append((upto, None))
            done = upto
        steps.append((0, None))
    return steps


@settings(max_examples=40, deadline=None)
@given(
    schedule=schedules(),
    first_block=st.integers(0, NUM_BLOCKS),
    frame_blocks=st.integers(1, NUM_BLOCKS),
    num_turns=st.integers(0, 6),
)
def test_any_order_of_readiness_delivers_every_block_once(
    schedule: list[tuple[int, int | None]], first_block: int, frame_blocks: int, num_turns: int
) -> None:
    async def run() -> None:
        with ends(first_block=first_block) as both:
            sending = asyncio.create_task(both.send(frame_blocks=frame_blocks))
            receiving = asyncio.create_task(both.receive())
            for num_blocks, num_layers in schedule:
                pages = SOURCE_PAGES if num_blocks else ()
                both.outgoing.advance(page_ids=pages, num_blocks=num_blocks, num_layers=num_layers)
                await turns(num_turns)
            both.finish()
            await asyncio.gather(sending, receiving)
            both.assert_arrived()

    asyncio.run(run())


@left_clean
async def test_after_stop_no_page_is_read_and_the_puller_is_told() -> None:
    with ends() as both:
        both.outgoing.advance(page_ids=SOURCE_PAGES[:2], num_blocks=2)
        sending, receiving = asyncio.create_task(both.send()), asyncio.create_task(both.receive())
        await turns(50)
        both.outgoing.advance(page_ids=SOURCE_PAGES, num_blocks=NUM_BLOCKS)
        both.outgoing.stop("the request was aborted")
        num_reads = both.source.num_reads
        with pytest.raises(TransferRefused, match="the source refuses: the request was aborted"):
            await receiving
        with pytest.raises(TransferRefused):
            await sending
        assert both.source.num_reads == num_reads > 0


@left_clean
async def test_a_source_that_computes_for_long_is_not_silent() -> None:
    with ends(idle_timeout_s=0.5) as both:
        heard = asyncio.create_task(both.receiving.receive_header())
        sending = asyncio.create_task(both.send(keep_alive_s=0.01))
        assert (await heard).kind is FrameKind.KEEP_ALIVE
        sending.cancel()
        await asyncio.wait([sending])


@left_clean
async def test_a_puller_that_leaves_ends_the_sender() -> None:
    with ends() as both:
        sending = asyncio.create_task(both.send(keep_alive_s=0.01))
        await turns(3)
        both.receiving.close()
        with pytest.raises(TransferInterrupted, match="broke"):
            await sending


@left_clean
async def test_a_puller_that_reads_nothing_holds_the_sender_back_then_ends_it() -> None:
    big = KvLayout(num_layers=1, num_kv_heads=8, head_dim=128, dtype="float32")
    ours, theirs = socket.socketpair()
    memory = Memory(seed=1, layout=big, num_pages=64)
    outgoing = Outgoing(num_layers=1, num_blocks=64)
    outgoing.advance(page_ids=range(64), num_blocks=64)
    with Connection(ours, peer="the puller", idle_timeout_s=0.05) as connection, theirs:
        sender = Sender(
            connection=connection,
            memory=memory,
            outgoing=outgoing,
            first_block=0,
            keep_alive_s=SOON_S,
            on_progress=lambda: None,
        )
        with pytest.raises(TransferInterrupted, match="did nothing for"):
            await sender.run(FrameBuffer(staging_bytes(big, num_blocks=64)))
    assert memory.num_reads < 64 * big.layer_block_bytes / FRAME_PAYLOAD_BYTES


# Sources that lie.

Lie = Callable[[Connection], Awaitable[None]]


def blocks(
    *, layer: int = 0, first: int = 0, num: int = 1, num_bytes: int | None = None
) -> tuple[FrameHeader, FrameBuffer]:
    size = num * LAYOUT.layer_block_bytes if num_bytes is None else num_bytes
    header = FrameHeader(
        kind=FrameKind.BLOCKS, layer=layer, first_block=first, num_blocks=num, payload_bytes=size
    )
    return header, FrameBuffer(size)


def says(*frames: tuple[FrameHeader, FrameBuffer]) -> Lie:
    async def lie(connection: Connection) -> None:
        for header, buffer in frames:
            await connection.send(header, buffer)

    return lie


def repeats(kind: FrameKind, payload: bytes = b"") -> Lie:
    async def lie(connection: Connection) -> None:
        with contextlib.suppress(TransferInterrupted):
            while True:
                await send_payload(connection, kind, payload)

    return lie


ALL = tuple(blocks(layer=layer, num=NUM_BLOCKS) for layer in range(LAYOUT.num_layers))
LIES: dict[str, tuple[Lie, str]] = {
    "a layer the model lacks": (says(blocks(layer=3)), "blocks of layer 3, the model has 3"),
    "a gap": (says(blocks(first=1)), "goes on with block 1, expected 0"),
    "a block twice": (says(blocks(), blocks()), "goes on with block 0, expected 1"),
    "more blocks than agreed": (says(blocks(num=NUM_BLOCKS + 1)), "8 blocks from 0 on"),
    "blocks after the last": (says(blocks(num=NUM_BLOCKS), blocks(first=NUM_BLOCKS)), "1 blocks from 7 on"),
    "endless numbers": (says(blocks(first=0, num=2**32 - 1, num_bytes=0)), "4294967295 blocks from 0 on"),
    "no blocks": (says(blocks(num=0)), "0 blocks from 0 on"),
    "too few bytes": (says(blocks(num_bytes=8)), "1 blocks in 8 bytes, each has 256"),
    "too many bytes": (says(blocks(num_bytes=2**22)), "1 blocks in 4194304 bytes"),
    "the state too early": (repeats(FrameKind.STATE, b"x"), "after 0 of 7 blocks of layer 0"),
    "the state one layer too early": (
        says(*ALL[:2], (FrameHeader(kind=FrameKind.STATE), FrameBuffer(0))),
        "after 0 of 7 blocks of layer 2",
    ),
    "an enormous state": (
        says(*ALL, (FrameHeader(kind=FrameKind.STATE, payload_bytes=2**21), FrameBuffer(2**21))),
        "STATE frame of 2097152 bytes",
    ),
    "endless keep-alives": (repeats(FrameKind.KEEP_ALIVE), "sent 4 keep-alives"),
    "keep-alives with a payload": (repeats(FrameKind.KEEP_ALIVE, b"x"), "KEEP_ALIVE frame of 1 bytes"),
    "a long refusal": (repeats(FrameKind.REFUSAL, bytes(2000)), "REFUSAL frame of 2000 bytes"),
    "a ticket": (repeats(FrameKind.TICKET, bytes(16)), "sent TICKET in a hand-over"),
}


@left_clean
@pytest.mark.parametrize(("lie", "found"), LIES.values(), ids=LIES)
async def test_a_source_that_lies_is_found_out(lie: Lie, found: str) -> None:
    with ends() as both:
        lying = asyncio.create_task(lie(both.sending))
        with pytest.raises(TransferCorrupted, match=found):
            await both.receive()
        both.receiving.close()
        await asyncio.gather(lying, return_exceptions=True)


@left_clean
async def test_a_frame_larger_than_the_staging_buffer_is_corrupt() -> None:
    with ends() as both:
        await says(blocks(num=3))(both.sending)
        with pytest.raises(TransferCorrupted, match="BLOCKS frame of 768 bytes, allowed are 512"):
            await both.receive(staging_blocks=2)


@left_clean
async def test_a_changed_byte_is_never_written_to_a_page() -> None:
    ours, theirs = socket.socketpair()
    with ends() as both, ours, Connection(theirs, peer="the source", idle_timeout_s=SOON_S) as connection:
        both.receiving.close()
        both.receiving = connection
        header, buffer = blocks()
        frame = bytearray(buffer.sealed(header))
        frame[-1] ^= 1
        ours.send(frame)
        with pytest.raises(TransferCorrupted, match="checksum"):
            await both.receive()
        assert np.array_equal(both.target.pages, both.untouched)


@left_clean
async def test_a_source_that_falls_silent_is_an_interruption() -> None:
    with ends(idle_timeout_s=0.05) as both, pytest.raises(TransferInterrupted, match="did nothing"):
        await both.receive()


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), is_framed=st.booleans(), kind=st.integers(0, 6))
def test_garbage_is_always_a_typed_error(data: bytes, is_framed: bool, kind: int) -> None:
    """Also behind a plausible beginning, so that more than the magic is put to the test."""

    async def run() -> None:
        ours, theirs = socket.socketpair()
        with ends() as both, ours, Connection(theirs, peer="the source", idle_timeout_s=SOON_S) as connection:
            both.receiving.close()
            both.receiving = connection
            ours.send(b"PNSK\x01" + bytes([kind, 0, 0]) + data if is_framed else data or b"x")
            ours.close()
            with pytest.raises(TransferError):
                await both.receive()

    asyncio.run(run())


# Cancelled pullers.


@left_clean
@pytest.mark.parametrize("num_turns", [0, 1, 2, 3, 5, 8, 13, 21])
async def test_after_a_cancelled_receive_nobody_writes(num_turns: int) -> None:
    with ends() as both:
        both.finish()
        sending, receiving = (
            asyncio.create_task(both.send(frame_blocks=1)),
            asyncio.create_task(both.receive()),
        )
        await turns(num_turns)
        receiving.cancel()
        await asyncio.wait([receiving])
        found = both.target.pages.copy()
        await turns(50)
        assert np.array_equal(both.target.pages, found)
        both.receiving.close()
        await asyncio.wait([sending])
        sending.exception()  # it may have finished, or lost its puller


# Tickets and limits.


@left_clean
async def test_a_ticket_arrives() -> None:
    with ends() as both:
        await send_ticket(both.receiving, bytes(range(16)))
        assert await receive_ticket(both.sending) == bytes(range(16))


@left_clean
@pytest.mark.parametrize(
    ("kind", "payload"),
    [(FrameKind.STATE, bytes(16)), (FrameKind.TICKET, b""), (FrameKind.TICKET, bytes(17))],
)
async def test_a_puller_that_does_not_begin_with_a_ticket_is_corrupt(kind: FrameKind, payload: bytes) -> None:
    with ends() as both:
        await send_payload(both.receiving, kind, payload)
        with pytest.raises(TransferCorrupted, match=r"must be TICKET of 16"):
            await receive_ticket(both.sending)


def test_frames_hold_whole_blocks_and_no_more_than_their_bound() -> None:
    big = KvLayout(num_layers=1, num_kv_heads=8, head_dim=128, dtype="bfloat16")
    assert staging_bytes(big, num_blocks=1000) == FRAME_PAYLOAD_BYTES
    assert staging_bytes(big, num_blocks=3) == 3 * big.layer_block_bytes
    huge = KvLayout(num_layers=1, num_kv_heads=512, head_dim=128, dtype="float32")
    with pytest.raises(ValueError, match="exceeds"):
        staging_bytes(huge, num_blocks=1)


def test_progress_that_cannot_be_is_refused() -> None:
    outgoing = Outgoing(num_layers=2, num_blocks=3)
    with pytest.raises(ValueError, match="4 blocks ready, of 3"):
        outgoing.advance(page_ids=range(9), num_blocks=4)
    with pytest.raises(ValueError, match="with 1 pages"):
        outgoing.advance(page_ids=(0,), num_blocks=2)
    with pytest.raises(ValueError, match="3 layers ready, the model has 2"):
        outgoing.advance(page_ids=range(3), num_blocks=3, num_layers=3)
    with pytest.raises(ValueError, match="finished with 0 of 3"):
        outgoing.finish(b"")
