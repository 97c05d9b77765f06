"""A real engine in a real loop over real tiers, and a peer that does what a test says: waits, fails, lies."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.blocks import BlockKey
from kvstore.codec.codec import KvCodec
from kvstore.holdings import Holdings
from kvstore.store import BlockStore
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_settings import DiskSettings
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.tier import BlockRun, Tier
from workers.compute_device import ComputeDevice
from workers.cost_model import CostModel
from workers.engine.engine import Engine, load_engine
from workers.errors import PullInterrupted, PullRefused
from workers.exports import ExportLimits, Exports
from workers.fetch import BlockFetcher, Chunk
from workers.handoff import Puller, PullTimeouts
from workers.kv_metrics import KvMetrics
from workers.load_parts import LoadLimits, LoadParts
from workers.loading import Loader
from workers.loop import LoopLimits, LoopParts, RequestLoop
from workers.metrics import WorkerMetrics
from workers.request import KvHolder, Request, RequestId, RequestOutput, SamplingParams, SessionId
from workers.scheduler import SchedulerLimits
from workers.state import EngineState, StateLimits
from workers.swap import Swap
from workers.tier_traffic import TierTraffic
from workers.write_behind import WriteBehind, WriteLimits, WriteParts

# 200 tokens: twelve full blocks in three chunks, and some tokens more, which are always computed.
PROMPT = [(7 * i) % 250 + 3 for i in range(200)]
NUM_BLOCKS, NUM_CHUNKS = 12, 3
SOON_S = 20.0
CHUNK_BLOCKS = 4
HOLDER = KvHolder(worker_id="peer", epoch=1, control_address="unix:/peer", num_blocks=1000)


class FixedCosts(CostModel):
    """An engine that is as slow as the test wants the plan to think."""

    def __init__(self, s_per_token: float) -> None:
        super().__init__(tokens_per_step=64)
        self.s_per_token = s_per_token

    def observe(self, rows: Any, *, step_s: float) -> None:
        pass

    def seconds(self, first_token: int, num_tokens: int) -> float:
        return num_tokens * self.s_per_token


class Gate:
    """Open unless shut; tells when somebody stands before it."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self.reached = asyncio.Event()

    def shut(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    async def passed(self) -> None:
        self.reached.set()
        await self._open.wait()


@dataclass(kw_only=True)
class Peer:
    """A BlockFetcher and its only peer, at the seam."""

    codec: KvCodec
    blocks: dict[BlockKey, bytes] = field(default_factory=dict)
    opening: Gate = field(default_factory=Gate)
    sending: Gate = field(default_factory=Gate)
    refuses: bool = False
    fails_after: int | None = None  # chunks
    garbles: bool = False
    next_blocks: dict[BlockKey, bytes] | None = (
        None  # what it has, and goes on with, once it has failed or garbled
    )
    has_same_profile: bool = True
    num_open: int = 0
    sent: list[tuple[int, int]] = field(default_factory=list)  # blocks and level

    async def open(self, holder: KvHolder, keys: Sequence[BlockKey]) -> "PeerFetch":
        await self.opening.passed()
        if self.refuses:
            raise PullRefused("the peer does not agree")
        held = list(itertools.takewhile(self.blocks.__contains__, keys))
        if not held:
            raise PullRefused("the peer has none of them")
        self.num_open += 1
        return PeerFetch(self, held)

    async def close(self) -> None:
        pass

    def becomes_the_next(self) -> None:
        if self.next_blocks is not None:
            self.blocks, self.next_blocks = self.next_blocks, None
            self.fails_after, self.garbles = None, False


class PeerFetch:
    def __init__(self, peer: Peer, keys: Sequence[BlockKey]) -> None:
        self._peer = peer
        self._keys = keys
        self._wanted: list[tuple[int, int, int]] = []
        self._is_broken = False
        self.tiers = (Tier.MEMORY,) * len(keys)
        self.num_blocks = len(keys)
        self.has_same_profile = peer.has_same_profile

    async def want(self, *, first_block: int, num_blocks: int, level: int) -> None:
        assert len(self._wanted) < 4
        assert first_block + num_blocks <= self.num_blocks
        self._wanted.append((first_block, num_blocks, level))

    async def receive(self) -> Chunk:
        peer = self._peer
        await peer.sending.passed()
        if self._is_broken or (peer.fails_after is not None and len(peer.sent) >= peer.fails_after):
            self._is_broken = True
            peer.becomes_the_next()
            raise PullInterrupted("the peer is gone")
        first_block, num_blocks, level = self._wanted.pop(0)
        peer.sent.append((num_blocks, level))
        keys = self._keys[first_block : first_block + num_blocks]
        payload = b"".join(peer.blocks[key] for key in keys)
        if level:
            arena_SX = np.frombuffer(payload, np.uint8).reshape(num_blocks, -1).copy()
            payload = peer.codec.encode(arena_SX, range(num_blocks), level=level)
        if peer.garbles:
            payload = payload[:-1]
            peer.becomes_the_next()
        return Chunk(
            first_block=first_block,
            num_blocks=num_blocks,
            level=level,
            payload=memoryview(payload),
            first_byte_s=time.monotonic(),
        )

    async def __aenter__(self) -> "PeerFetch":
        return self

    async def __aexit__(self, *error: object) -> None:
        self._peer.num_open -= 1


class Ear:
    """Hears what a session's outbox is told."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.changed = asyncio.Event()

    def put(self, step_number: int, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)
        self.changed.set()

    def put_refusal(self, request_id: RequestId, error: Exception) -> None:
        raise error


@dataclass(kw_only=True)
class End:
    """One worker without a server."""

    engine: Engine
    state: EngineState
    memory: MemoryTier
    store: BlockStore
    peer: Peer
    kv_metrics: KvMetrics
    metrics: WorkerMetrics
    costs: FixedCosts
    write_behind: WriteBehind
    loop: RequestLoop
    ear: Ear
    offered: list[BlockRun]
    session_id: SessionId
    numbers: Any = field(default_factory=itertools.count)

    def submit(self, prompt: list[int], **fields: Any) -> RequestId:
        sampling = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
        names = [name for name in fields if name in SamplingParams.__dataclass_fields__]
        request = Request(
            request_id=RequestId(f"r{next(self.numbers)}"),
            session_id=self.session_id,
            prompt_token_ids=prompt,
            sampling=SamplingParams(**(sampling | {name: fields.pop(name) for name in names})),
            **({"arrival_s": 0.0} | fields),
        )
        self.loop.submit(request)
        return request.request_id

    async def ended(self, request_id: RequestId) -> RequestOutput:
        async with asyncio.timeout(SOON_S):
            while not (said := self.ear.outputs.get(request_id)) or said[-1].finish_reason is None:
                self.ear.changed.clear()
                await self.ear.changed.wait()
        return said[-1]

    async def answer(self, prompt: list[int], **fields: Any) -> tuple[list[int], RequestOutput]:
        """The tokens and the last word."""
        request_id = self.submit(prompt, **fields)
        last = await self.ended(request_id)
        return [token for output in self.ear.outputs[request_id] for token in output.token_ids], last

    async def settled(self) -> None:
        """Nothing moves any more, and everything is where it was."""
        async with asyncio.timeout(SOON_S):
            await self.loop.settled()
            # A write to disk pins what it writes, and a puller that is gone what was on its way, until they end.
            while self.memory.num_idle < self.memory.num_slots:  # noqa: ASYNC110
                await asyncio.sleep(0)
        self.state.check()
        self.memory.check()
        load = self.state.load()
        assert load.num_free_pages == load.num_pages, "pages are lost"
        assert self.state.num_pinned_pages == self.write_behind.num_pinned == self.peer.num_open == 0
        assert not [t for t in asyncio.all_tasks() if t.get_name().startswith(("load ", "write-behind"))]

    def give_to(self, peer: Peer) -> None:
        """All that this worker's memory holds is what the peer has from now on."""
        for key in self.held_keys():
            [slot] = self.memory.pin([key])
            peer.blocks[key] = self.memory.arena_SX[slot].tobytes()
            self.memory.unpin([slot])

    def held_keys(self) -> list[BlockKey]:
        return [key for run in self.offered for key in run.keys if key in self.memory]

    def sample(self, name: str, **labels: str) -> float:
        found = self.metrics.registry.get_sample_value(name, {"model_name": "tiny"} | labels)
        return found or 0.0

    @property
    def num_loaded(self) -> dict[str, float]:
        tiers = {tier.name.lower() for tier in Tier}
        loaded = {tier: self.sample("penstock_kv_loaded_blocks_total", tier=tier) for tier in tiers}
        return {tier: num for tier, num in loaded.items() if num}


@contextlib.asynccontextmanager
async def running_end(
    checkpoint: Path,
    *,
    num_slots: int = 256,
    num_pages: int = 64,
    disk: Path | None = None,
    max_level: int = 0,
    limits: dict[str, Any] | None = None,
    real_fetcher: BlockFetcher | None = None,
    compute: ComputeDevice | None = None,
    **write_limits: Any,
) -> AsyncIterator[End]:
    """Without a `real_fetcher` its peer is `Peer`."""
    engine = load_engine(model_path=checkpoint, num_pages=num_pages, compute=compute or ComputeDevice())
    model, pool = engine.model, engine.kv_pool
    state = EngineState(
        StateLimits(
            num_pages=num_pages,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            model_fingerprint=model.fingerprint,
            max_num_waiting=100,
        )
    )
    block_bytes = model.layout.block_bytes
    memory = MemoryTier(
        np.zeros(num_slots * block_bytes, np.uint8),
        block_bytes=block_bytes,
        policy="lru",
        holdings=Holdings(),
    )
    tier = None
    if disk is not None:
        settings = DiskSettings(block_bytes=block_bytes, capacity_bytes=2**28, namespace=b"n" * 32)
        tier = DiskTier.open(disk, settings=settings)
    store = BlockStore(memory, disk=tier)
    metrics = WorkerMetrics(model_name="tiny", num_pages=num_pages, block_size_tokens=16)
    kv_metrics = KvMetrics(metrics.registry, model_name="tiny")
    codec = KvCodec(model.layout, profile=None)
    peer, costs, offered = Peer(codec=codec), FixedCosts(1.0), []

    def post(message: Any) -> None:
        loop.post(message)

    fetcher: Any = real_fetcher or peer
    loader = Loader(
        LoadParts(
            state=state,
            kv_pool=pool,
            store=store,
            fetcher=fetcher,
            codec=codec,
            costs=costs,
            metrics=kv_metrics,
            limits=LoadLimits(
                **(
                    {"max_level": max_level, "ttft_objective_s": 1.0, "chunk_blocks": CHUNK_BLOCKS}
                    | (limits or {})
                )
            ),
            post=post,
        )
    )
    write_behind = WriteBehind(
        WriteParts(
            state=state, kv_pool=pool, store=store, metrics=kv_metrics, offer=offered.append, post=post
        ),
        limits=WriteLimits(**({"max_pinned_share": 1.0, "linger_s": 0.01} | write_limits)),
    )
    exports = Exports(
        pool, limits=ExportLimits(lease_s=30.0), on_released=lambda _: None, on_expired=lambda _: None
    )
    puller = Puller(pool, model_fingerprint=model.fingerprint, timeouts=PullTimeouts(total_s=30.0))
    tiers = TierTraffic(
        loader, write_behind, swap=Swap(state, loader, write_behind, costs=costs), costs=costs
    )
    step_limits = SchedulerLimits(max_num_batched_tokens=64, max_num_seqs=8, max_num_pulls=2)
    loop = RequestLoop(
        LoopParts(state=state, engine=engine, exports=exports, puller=puller, metrics=metrics, tiers=tiers),
        limits=LoopLimits(step=step_limits, max_num_submitted=100),
    )
    ear: Any = Ear()
    end = End(
        engine=engine, state=state, memory=memory, store=store, peer=peer, kv_metrics=kv_metrics,
        metrics=metrics, costs=costs, write_behind=write_behind, loop=loop, ear=ear, offered=offered,
        session_id=loop.open_session(ear),
    )  # fmt: skip
    task = asyncio.create_task(loop.run())
    try:
        yield end
    finally:
        task.cancel()
        await asyncio.wait({task})
        await puller.close()
        exports.close_all()
        await store.close()
