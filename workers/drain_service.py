"""The RPC `Drain`, of workers and stores alike."""

import math
from collections.abc import Callable
from typing import Any

import grpc

from protos import worker_pb2
from workers.drain import Drain, Left


class DrainService:
    """`left` says what there is now."""

    def __init__(self, drain: Drain, *, left: Callable[[], Left]) -> None:
        self._drain = drain
        self._left = left

    async def drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainReply:
        """Refuses a deadline that is none."""
        if not 0.0 <= request.timeout_s < math.inf:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"timeout_s must be a number of seconds, or 0 for the worker's own, got {request.timeout_s}",
            )
        self._drain.begin(request.timeout_s or None)
        return _to_wire(await self._drain.until_stopped() if request.until_stopped else self._left())


def _to_wire(left: Left) -> worker_pb2.DrainReply:
    return worker_pb2.DrainReply(
        num_requests=left.num_requests,
        num_leases=left.num_leases,
        num_pages=left.num_pages,
        num_blocks=left.num_blocks,
        request_ids=left.request_ids,
    )
