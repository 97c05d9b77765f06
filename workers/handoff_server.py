"""The gRPC face of `Exports`: who may pull, and the status each refusal has."""

from dataclasses import dataclass

import grpc

from kvstore.layout import KvLayout
from protos import kv_pb2, kv_pb2_grpc, worker_pb2
from workers.exports import Exports, NoSuchExport
from workers.handoff_wire import layout_to_wire
from workers.request import RequestId

# A pull without a deadline of its own waits no longer than this.
MAX_PULL_WAIT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceIdentity:
    """What a puller must mean and agree with to pull from this worker."""

    epoch: int
    model_fingerprint: bytes
    layout: KvLayout
    data_address: str  # as peers reach it


class KvTransferService(kv_pb2_grpc.KvTransferServicer):
    """Checks every message against the identity of this incarnation."""

    def __init__(self, exports: Exports, *, identity: SourceIdentity) -> None:
        self._exports = exports
        self._identity = identity

    async def Pull(
        self,
        request: kv_pb2.PullRequest,
        context: grpc.aio.ServicerContext[kv_pb2.PullRequest, kv_pb2.PullReply],
    ) -> kv_pb2.PullReply:
        mismatch = self._mismatch(request)
        if mismatch is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, mismatch)
        try:
            issued = await self._exports.issue_ticket(
                RequestId(request.request_id),
                first_block=request.first_block,
                timeout_s=min(context.time_remaining() or MAX_PULL_WAIT_S, MAX_PULL_WAIT_S),
            )
        except NoSuchExport as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return kv_pb2.PullReply(
            ticket=issued.ticket,
            data_address=self._identity.data_address,
            num_blocks=issued.num_blocks,
        )

    async def Release(
        self,
        request: kv_pb2.ReleaseRequest,
        context: grpc.aio.ServicerContext[kv_pb2.ReleaseRequest, kv_pb2.ReleaseReply],
    ) -> kv_pb2.ReleaseReply:
        if request.source_epoch != self._identity.epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self._epoch_text(request.source_epoch))
        self._exports.release(RequestId(request.request_id))
        return kv_pb2.ReleaseReply()

    def _mismatch(self, request: kv_pb2.PullRequest) -> str | None:
        ours = self._identity
        if request.source_epoch != ours.epoch:
            return self._epoch_text(request.source_epoch)
        if request.model_fingerprint != ours.model_fingerprint:
            return (
                f"the puller's model is {request.model_fingerprint.hex()}, "
                f"this worker serves {ours.model_fingerprint.hex()}"
            )
        layout = layout_to_wire(ours.layout)
        if request.layout != layout:
            return f"the puller's KV layout is {_line(request.layout)}, this worker's {_line(layout)}"
        return None

    def _epoch_text(self, epoch: int) -> str:
        return f"the message is for epoch {epoch}, this worker is epoch {self._identity.epoch}"


def _line(layout: worker_pb2.KvLayout) -> str:
    return (
        f"{layout.num_layers} layers of {layout.num_kv_heads} heads of {layout.head_dim}, "
        f"{layout.dtype}, {layout.block_size_tokens} tokens a block"
    )
