"""The verbs of the KV store over gRPC: pulls by key, lookups, offers, what the tiers hold, and forgetting it."""

import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from kvstore.blocks import BlockKey
from kvstore.store import BlockStore
from kvstore.tiers.tier import Tier, TierStats
from protos import kv_pb2
from workers.agreement import Disagreement, SourceIdentity, check_block_format, check_epoch, check_model
from workers.block_exports import BlockExports, NotHeld, TooManyTickets
from workers.block_wire import (
    MAX_PREFIXES,
    description_to_wire,
    holder_from_wire,
    key_from_wire,
    keys_from_wire,
    runs_from_wire,
)
from workers.errors import InvalidRequest
from workers.kv_metrics import KvMetrics
from workers.offer_intake import OfferIntake, TooManyOffers

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


# Of peers: what they hold is theirs to say.
NO_STATS = TierStats(
    num_blocks=0, capacity_blocks=0, used_bytes=0, capacity_bytes=0,
    num_hit_blocks=0, num_stored_blocks=0, num_evicted_blocks=0, num_errors=0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class DevicePages:
    """The engine's part of what a worker holds; a store has none."""

    stats: Callable[[], TierStats]
    drop: Callable[[BlockKey | None], Awaitable[int]]  # blocks that nobody uses; how many they were


class BlockService:
    """Answers for one store of blocks. `intake` is for workers that take offers."""

    def __init__(
        self,
        store: BlockStore,
        *,
        exports: BlockExports,
        metrics: KvMetrics,
        device: DevicePages | None = None,
        intake: OfferIntake | None = None,
    ) -> None:
        self._store = store
        self._exports = exports
        self._metrics = metrics
        self._device = device
        self._intake = intake

    async def pull(
        self, request: kv_pb2.PullRequest, context: Context, *, identity: SourceIdentity
    ) -> kv_pb2.PullReply:
        """The epoch and the model were checked."""
        keys = await self._keys(request.block_keys, request.block_format, context)
        if request.codec_profile != self._exports.codec_profile:
            self._metrics.mismatch("profile")
        try:
            issued = self._exports.issue_ticket(keys, codec_profile=request.codec_profile)
        except NotHeld as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except TooManyTickets as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        return kv_pb2.PullReply(
            ticket=issued.ticket,
            data_address=identity.data_address,
            num_blocks=len(issued.tiers),
            tiers=bytes(issued.tiers),
            codec_profile=self._exports.codec_profile,
        )

    async def lookup(
        self, request: kv_pb2.LookupRequest, context: Context, *, identity: SourceIdentity
    ) -> kv_pb2.LookupReply:
        await self.agree(check_epoch(identity, request.source_epoch), context)
        tiers = self._store.lookup(await self._keys(request.block_keys, request.block_format, context))
        return kv_pb2.LookupReply(num_blocks=len(tiers), tiers=bytes(tiers))

    async def put(
        self, request: kv_pb2.PutRequest, context: Context, *, identity: SourceIdentity
    ) -> kv_pb2.PutReply:
        if self._intake is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this worker is no store and takes no offers")
        await self.agree(check_epoch(identity, request.store_epoch), context)
        await self.agree(
            check_model(identity, fingerprint=request.model_fingerprint, layout=request.layout), context
        )
        await self.agree(check_block_format(request.block_format), context)
        try:
            runs, holder = runs_from_wire(request.runs), holder_from_wire(request.holder)
        except InvalidRequest as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        try:
            taken = await self._intake.take(runs, holder)
        except TooManyOffers as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        return kv_pb2.PutReply(num_taken=taken.num_taken, num_known=taken.num_known)

    async def describe(
        self, request: kv_pb2.DescribeTiersRequest, context: Context
    ) -> kv_pb2.TiersDescription:
        store = self._store.describe(max_prefixes=min(request.num_prefixes, MAX_PREFIXES))
        if self._device is None:
            return description_to_wire(
                store, more_tiers={}, num_lookup_blocks=store.num_lookup_blocks, levels=self._metrics.levels
            )
        return description_to_wire(
            store,
            more_tiers=self._tiers_of_requests(store.tiers, self._device.stats()),
            num_lookup_blocks=self._metrics.num_lookup_blocks,
            levels=self._metrics.levels,
        )

    def _tiers_of_requests(self, tiers: Mapping[Tier, TierStats], device: TierStats) -> dict[Tier, TierStats]:
        """Hits are what requests found here; what peers pulled is none of them."""
        hits = self._metrics.num_hit_blocks
        tiers = {Tier.DEVICE: device, Tier.PEER: NO_STATS, **tiers}
        return {tier: dataclasses.replace(stats, num_hit_blocks=hits[tier]) for tier, stats in tiers.items()}

    async def drop(
        self, request: kv_pb2.DropRequest, context: Context, *, identity: SourceIdentity
    ) -> kv_pb2.DropReply:
        await self.agree(check_epoch(identity, request.source_epoch), context)
        try:
            root = key_from_wire(request.root, name="root") if request.root else None
        except InvalidRequest as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        # Device pages first: they must not be written behind again.
        num_blocks = 0 if self._device is None else await self._device.drop(root)
        try:
            num_blocks += await self._store.drop(root)
        finally:
            self._exports.drop_coded()  # not earlier: what is left of the root may be encoded meanwhile
        return kv_pb2.DropReply(num_blocks=num_blocks)

    async def agree(self, disagreement: Disagreement | None, context: Context) -> None:
        """Aborts the call with FAILED_PRECONDITION, and counts, if there is one."""
        if disagreement is None:
            return
        if disagreement.what != "epoch":
            self._metrics.mismatch(disagreement.what)
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, disagreement.text)

    async def _keys(self, data: bytes, block_format: bytes, context: Context) -> tuple[BlockKey, ...]:
        await self.agree(check_block_format(block_format), context)
        try:
            return keys_from_wire(data)
        except InvalidRequest as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
