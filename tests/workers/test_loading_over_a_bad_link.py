"""A source that freezes, dies or is left in the middle of what it says: the rest is computed, and nothing is left."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from kvstore.frames import HEADER_BYTES
from tests.relay import Relay
from tests.workers.block_ends import TIMEOUTS, serving
from tests.workers.handoff_ends import wait_until
from tests.workers.loading_ends import CHUNK_BLOCKS, SOON_S, End, running_end
from workers.fetch import BlockFetcher
from workers.request import FinishReason, KvHolder

# 200 tokens: twelve full blocks in three chunks, and some tokens more, which are always computed.
PROMPT = [(7 * i) % 250 + 3 for i in range(200)]
NUM_BLOCKS = 12
# How fast the engine thinks it is: nobody waits longer for a chunk of 64 tokens than 0.6 s.
S_PER_TOKEN = 0.01


@dataclass(frozen=True, slots=True)
class Link:
    """`end` loads from `source`, through `relay`."""

    source: End
    relay: Relay
    end: End
    holder: KvHolder
    truth: list[int]

    @property
    def chunk_bytes(self) -> int:
        return HEADER_BYTES + CHUNK_BLOCKS * self.end.engine.model.layout.block_bytes

    async def forget(self) -> None:
        """What the end knows of the prompt, when all of it has come to rest."""
        await self.end.settled()
        self.end.state.drop(None)
        await self.end.store.drop(None)

    async def settled(self) -> None:
        """At both ends, and between them."""
        await self.end.settled()
        await wait_until(lambda: self.relay.num_connections == 0)
        await self.source.settled()


@pytest.fixture
async def link(checkpoint: Path) -> AsyncIterator[Link]:
    relay = Relay()
    async with running_end(checkpoint) as source:
        truth, _ = await source.answer(PROMPT)
        await source.settled()
        model = source.engine.model
        fetcher = BlockFetcher(
            model_fingerprint=model.fingerprint, layout=model.layout, profile_id=b"", timeouts=TIMEOUTS
        )
        async with (
            serving(
                source.store, fingerprint=model.fingerprint, layout=model.layout, relay=relay
            ) as at_source,
            running_end(checkpoint, real_fetcher=fetcher) as end,
        ):
            end.costs.s_per_token = S_PER_TOKEN
            holder = KvHolder(
                worker_id="source", epoch=at_source.epoch, control_address=at_source.control_address,
                num_blocks=NUM_BLOCKS,
            )  # fmt: skip
            made = Link(source, relay, end, holder, truth)
            # Undisturbed once: channels are open and threads run from here on.
            tokens, last = await end.answer(PROMPT, kv_holders=(holder,))
            assert (tokens, last.num_cached_tokens) == (truth, NUM_BLOCKS * 16)
            await made.forget()
            await made.settled()
            yield made
            await relay.close()
            await fetcher.close()


@pytest.fixture
async def nothing_more_is_there(link: Link) -> AsyncIterator[None]:
    process, num_tasks = psutil.Process(), len(asyncio.all_tasks())
    num_fds = process.num_fds()
    yield
    await link.settled()
    await wait_until(lambda: len(asyncio.all_tasks()) <= num_tasks)
    await wait_until(lambda: process.num_fds() <= num_fds)


async def freeze(link: Link) -> None:
    link.relay.freeze()


async def die(link: Link) -> None:
    await link.relay.cut()


# Where in the stream of three chunks, the last of the prompt first; and how many blocks have come by then.
PLACES = {
    "before the first byte": (0.0, 0),
    "in the first header": (0.0004, 0),
    "in the first chunk": (0.5, 0),
    "in the second chunk": (1.5, CHUNK_BLOCKS),
    "before the last byte": (2.9999, 2 * CHUNK_BLOCKS),
}


@pytest.mark.usefixtures("nothing_more_is_there")
@pytest.mark.parametrize(("num_chunks", "num_come"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("fate", [freeze, die])
async def test_what_a_source_does_not_send_any_more_is_computed(
    link: Link, fate: Callable[[Link], Awaitable[None]], num_chunks: float, num_come: int
) -> None:
    link.relay.hold_after(int(num_chunks * link.chunk_bytes))
    request_id = link.end.submit(PROMPT, kv_holders=(link.holder,))
    async with asyncio.timeout(SOON_S):
        await link.relay.is_holding.wait()
        await fate(link)
    last = await link.end.ended(request_id)
    assert [token for output in link.end.ear.outputs[request_id] for token in output.token_ids] == link.truth
    assert last.num_cached_tokens == num_come * 16
    link.relay.thaw()


@pytest.mark.usefixtures("nothing_more_is_there")
@pytest.mark.parametrize("num_chunks", [num_chunks for num_chunks, _ in PLACES.values()], ids=PLACES)
async def test_a_request_that_is_aborted_there_leaves_nothing_at_either_end(
    link: Link, num_chunks: float
) -> None:
    link.relay.hold_after(int(num_chunks * link.chunk_bytes))
    request_id = link.end.submit(PROMPT, kv_holders=(link.holder,))
    async with asyncio.timeout(SOON_S):
        await link.relay.is_holding.wait()
    link.end.loop.abort(link.end.session_id, request_id)
    assert (await link.end.ended(request_id)).finish_reason is FinishReason.ABORT


@pytest.mark.usefixtures("nothing_more_is_there")
async def test_after_a_source_that_froze_the_next_request_is_loaded_again(link: Link) -> None:
    link.relay.freeze()
    tokens, last = await link.end.answer(PROMPT, kv_holders=(link.holder,))
    assert (tokens, last.num_cached_tokens) == (link.truth, 0)
    link.relay.thaw()
    await link.forget()
    tokens, last = await link.end.answer(PROMPT, kv_holders=(link.holder,))
    assert (tokens, last.num_cached_tokens) == (link.truth, NUM_BLOCKS * 16)
