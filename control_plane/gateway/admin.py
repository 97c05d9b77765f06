"""What operators ask of a gateway over HTTP: which requests run, and to move one. `penstock top` and `migrate` do."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from control_plane.gateway.body import read_request
from control_plane.gateway.move import MoveOutcome
from control_plane.gateway.moves import Moves, RunningRequest
from control_plane.gateway.openapi import ERRORS, Responses, json_reply
from control_plane.gateway.replies import ErrorReply
from control_plane.gateway.settings import GatewaySettings
from control_plane.migration import MoveReason

REQUESTS_PATH = "/admin/requests"


class MoveRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    worker: str = Field(min_length=1, max_length=256, description="Where it should go on.")


class RequestReply(BaseModel):
    """`worker` and `pool` are null while it waits for a worker."""

    request_id: str
    worker: str | None
    pool: str | None
    num_prompt_tokens: int
    num_output_tokens: int
    priority: int
    age_s: float
    moving_to: str | None


class MoveReply(BaseModel):
    """Only `moved` means that it moved; with any other outcome it goes on where it was, or has ended."""

    request_id: str
    source: str
    target: str
    reason: MoveReason
    outcome: MoveOutcome
    detail: str
    num_tokens: int
    duration_s: float
    handed_over_s: float | None
    gap_s: float | None
    ended_unix_s: float


class RequestsReply(BaseModel):
    requests: list[RequestReply]  # the oldest first
    recent_moves: list[MoveReply]  # the newest last


def add_admin_api(app: FastAPI, moves: Moves, *, settings: GatewaySettings) -> None:
    async def requests() -> Response:
        return JSONResponse(
            {
                "requests": [_as_json(request) for request in moves.requests()],
                "recent_moves": [report.as_json() for report in moves.recent],
            }
        )

    async def move(request_id: str, request: Request) -> Response:
        body = await read_request(request, MoveRequest, settings=settings)
        report = await moves.move(request_id, body.worker)
        return JSONResponse(report.as_json())

    router = APIRouter()
    router.add_api_route(REQUESTS_PATH, requests, responses=json_reply(RequestsReply))
    router.add_api_route(
        REQUESTS_PATH + "/{request_id}/move",
        move,
        methods=["POST"],
        responses=json_reply(MoveReply) | _MOVE_ERRORS,
        openapi_extra=_MOVE_BODY,
    )
    app.include_router(router)


_MOVE_ERRORS: Responses = {
    **{code: ERRORS[code] for code in (400, 408, 413, 415)},
    404: {"model": ErrorReply, "description": "No such request runs here, or there is no such worker"},
    409: {"model": ErrorReply, "description": "The request or the worker is in no state for it"},
}
_MOVE_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": MoveRequest.model_json_schema()}},
    }
}


def _as_json(request: RunningRequest) -> dict[str, Any]:
    return {
        **{name: value for name, value in asdict(request).items() if name in RequestReply.model_fields},
        "worker": None if request.worker is None else request.worker.worker_id,
        "pool": None if request.role is None else request.role.value,
        "moving_to": None if request.moving_to is None else request.moving_to.worker_id,
    }
