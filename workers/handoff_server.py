"""The gRPC face of all that can be pulled: who may, and the status each refusal has."""

from collections.abc import Callable
from dataclasses import dataclass

import grpc

from protos import kv_pb2, kv_pb2_grpc
from workers.agreement import SourceIdentity, check_epoch, check_model
from workers.block_server import BlockService, Context
from workers.errors import QueueFull
from workers.exports import Exports, NoSuchExport
from workers.request import RequestId

# A pull without a deadline of its own waits no longer than this.
MAX_PULL_WAIT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputingSource:
    """The part of a worker with an engine. `open_move` raises NoSuchExport and QueueFull."""

    exports: Exports
    open_move: Callable[[RequestId, int], None]  # a request that runs, to one with room for so many pages


class KvTransferService(kv_pb2_grpc.KvTransferServicer):
    """Checks every message against the identity of this incarnation.

    `computing` is there where requests are computed, `blocks` where there are tiers below the device pages.
    """

    def __init__(
        self,
        *,
        identity: SourceIdentity,
        computing: ComputingSource | None = None,
        blocks: BlockService | None = None,
    ) -> None:
        self._identity = identity
        self._computing = computing
        self._blocks = blocks

    async def Pull(self, request: kv_pb2.PullRequest, context: Context) -> kv_pb2.PullReply:
        disagreement = check_epoch(self._identity, request.source_epoch) or check_model(
            self._identity, fingerprint=request.model_fingerprint, layout=request.layout
        )
        if self._blocks is not None:
            await self._blocks.agree(disagreement, context)
        elif disagreement is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, disagreement.text)
        if request.block_keys:
            return await (await self._tiers(context)).pull(request, context, identity=self._identity)
        return await self._pull_request(request, context)

    async def Release(self, request: kv_pb2.ReleaseRequest, context: Context) -> kv_pb2.ReleaseReply:
        disagreement = check_epoch(self._identity, request.source_epoch)
        if disagreement is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, disagreement.text)
        if self._computing is not None:
            self._computing.exports.release(RequestId(request.request_id))
        return kv_pb2.ReleaseReply()

    async def Lookup(self, request: kv_pb2.LookupRequest, context: Context) -> kv_pb2.LookupReply:
        return await (await self._tiers(context)).lookup(request, context, identity=self._identity)

    async def Put(self, request: kv_pb2.PutRequest, context: Context) -> kv_pb2.PutReply:
        return await (await self._tiers(context)).put(request, context, identity=self._identity)

    async def DescribeTiers(
        self, request: kv_pb2.DescribeTiersRequest, context: Context
    ) -> kv_pb2.TiersDescription:
        return await (await self._tiers(context)).describe(request, context)

    async def Drop(self, request: kv_pb2.DropRequest, context: Context) -> kv_pb2.DropReply:
        return await (await self._tiers(context)).drop(request, context, identity=self._identity)

    async def _pull_request(self, request: kv_pb2.PullRequest, context: Context) -> kv_pb2.PullReply:
        if self._computing is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "a store computes no requests; name blocks")
        request_id = RequestId(request.request_id)
        try:
            if request.num_pages:
                self._computing.open_move(request_id, request.num_pages)
            issued = await self._computing.exports.issue_ticket(
                request_id,
                first_block=request.first_block,
                timeout_s=min(context.time_remaining() or MAX_PULL_WAIT_S, MAX_PULL_WAIT_S),
            )
        except NoSuchExport as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except QueueFull as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return kv_pb2.PullReply(
            ticket=issued.ticket, data_address=self._identity.data_address, num_blocks=issued.num_blocks
        )

    async def _tiers(self, context: Context) -> BlockService:
        if self._blocks is None:
            await context.abort(
                grpc.StatusCode.UNIMPLEMENTED, "this worker has no tiers: memory_tier_bytes is 0"
            )
        return self._blocks
