"""Sends every generation to the workers that routing picks and makes one stream of what they answer.

Tokens are numbered, so it does not matter who sends them: the prefill worker's first token, the decode worker's,
and those of another decode worker after a failure are one sequence (token_merge).
"""

import asyncio
import itertools
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from control_plane.directory.member import Role, WorkerId
from control_plane.directory.memory import MemoryDirectory
from control_plane.directory.overlap import Overlap
from control_plane.errors import (
    GenerationFailed,
    GenerationTimeout,
    InvalidRequest,
    NoWorkers,
    QueueFull,
    RequestError,
)
from control_plane.gateway.admission import Admission, AdmissionLimits
from control_plane.gateway.attempt import Attempt
from control_plane.gateway.backend import ServedModel
from control_plane.gateway.logs import log_event
from control_plane.gateway.progress import Progress
from control_plane.gateway.sessions import SessionClosed, SessionPool
from control_plane.gateway.suspicion import judge
from control_plane.gateway.tenancy import Tenant
from control_plane.gateway.token_merge import TokenMerge
from control_plane.gateway.wire import Assignment, FailureCode, KvHolder, WorkerFailure
from control_plane.generation import Generation, TokenChunk
from control_plane.routing.policy import RoutingPolicy
from control_plane.routing.router import route
from control_plane.routing.view import (
    ClusterView,
    Holding,
    NoPlacement,
    Placement,
    RoutingRequest,
    WorkerView,
)
from kvstore.blocks import BLOCK_SIZE_TOKENS

# Of an id in front of our own number; workers take at most 256 characters.
MAX_REQUEST_ID_CHARS = 200
# After a worker was lost: what a restarted one needs at least.
NO_WORKERS_RETRY_AFTER_S = 2.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchSettings:
    """`request_timeout_s`: without any token. `connect_wait_s`: for a worker that has joined to answer hello, or
    one whose session broke to do so again.

    `worker_wait_s`: for another one, after the last that could serve a request has gone or has begun to stop.
    """

    max_concurrent_requests: int
    max_queued_requests: int
    request_timeout_s: float
    worker_wait_s: float
    max_queued_per_tenant: int | None = None  # None: as many as of all
    max_retries: int = 2
    connect_wait_s: float = 2.0


class PoolDispatcher:
    """The `Dispatcher` of `gateway.backend`. Used from one event loop."""

    def __init__(
        self,
        directory: MemoryDirectory,
        sessions: SessionPool,
        *,
        policy: RoutingPolicy,
        settings: DispatchSettings,
    ) -> None:
        self._directory = directory
        self._sessions = sessions
        self._policy = policy
        self._settings = settings
        self._numbers = itertools.count(1)
        self._name = secrets.token_hex(4)
        self.running: set[Progress] = set()  # all that were let in
        per_tenant = settings.max_queued_per_tenant
        self.admission = Admission(
            AdmissionLimits(
                max_concurrent=settings.max_concurrent_requests,
                max_queued=settings.max_queued_requests,
                max_queued_per_tenant=settings.max_queued_requests if per_tenant is None else per_tenant,
            ),
            now_s=time.monotonic,
        )

    def models(self) -> Sequence[ServedModel]:
        """Those that somebody generates with, or whose workers may be back soon; where they differ, the length that
        all of them can do."""
        served = [
            session.member.model
            for session in self._sessions.sessions()
            if session.is_ready and session.member.role.can_decode
        ]
        now_s = asyncio.get_running_loop().time()
        served += self._sessions.absences.models(since_s=now_s - self._settings.worker_wait_s)
        lengths: dict[str, int] = {}
        for model in served:
            lengths[model.name] = min(model.max_model_len, lengths.get(model.name, model.max_model_len))
        return [ServedModel(name=name, max_model_len=length) for name, length in sorted(lengths.items())]

    def ready(self) -> bool:
        return any(
            session.is_ready and session.member.role.can_decode and not session.member.is_draining
            for session in self._sessions.sessions()
        )

    async def generate(self, generation: Generation) -> AsyncGenerator[TokenChunk, None]:
        """See `Dispatcher.generate`. However it ends, no worker goes on with the request."""
        tenant = Tenant(generation.tenant, generation.tenant_weight)
        await self._enter(tenant)
        run = Progress(
            generation=generation,
            merge=TokenMerge(max_tokens=generation.sampling.max_tokens),
            arrival_unix_s=time.time(),
        )
        self.running.add(run)
        try:
            while not run.is_finished:
                attempt = run.attempt or await self._place(run)
                chunk, failure = run.absorb(await attempt.take())
                if chunk is not None:
                    yield chunk
                if failure is not None:
                    self._count_failure(run, failure)
        finally:
            # Nothing here waits, so a second cancellation cannot cut it short.
            run.close_attempt()
            self.running.discard(run)
            self.admission.leave(tenant, has_completed=run.is_finished)

    async def _enter(self, tenant: Tenant) -> None:
        timeout_s = self._settings.request_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self.admission.enter(tenant)
        except TimeoutError:
            raise GenerationTimeout(f"the request waited {timeout_s:g} s in the queue") from None

    async def _place(self, run: Progress) -> Attempt:
        """Submits to whom routing picks, once somebody can be picked."""
        await judge(run.suspicion, self._sessions, wait_s=self._settings.connect_wait_s)
        began_s = asyncio.get_running_loop().time()
        while True:
            placement = self._route(run)
            if isinstance(placement, Placement):
                try:
                    return self._submit(run, placement)
                except SessionClosed:
                    run.excluded.add(placement.decode)
                    continue
            try:
                async with asyncio.timeout_at(self._wait_until_s(run, placement, began_s=began_s)):
                    await self._sessions.wait_for_change()
            except TimeoutError:
                raise self._nobody_error(run, placement) from None

    def _route(self, run: Progress) -> Placement | NoPlacement:
        request = RoutingRequest(
            num_prompt_tokens=run.num_tokens,
            overlaps=self._overlaps(run),
            model_fingerprint=run.model_fingerprint,
            excluded=frozenset(run.excluded),
            can_hand_over=not run.merge.token_ids,
        )
        return route(request, self._view(), self._policy)

    def _overlaps(self, run: Progress) -> dict[WorkerId, Overlap]:
        overlaps: dict[WorkerId, Overlap] = {}
        if not self._directory.blocks.is_empty:
            fingerprints = {session.member.model.fingerprint for session in self._sessions.sessions()}
            for fingerprint in fingerprints:
                overlaps.update(self._directory.blocks.overlaps(run.block_keys(fingerprint)))
        return overlaps

    def _view(self) -> ClusterView:
        """Stores have no session, only their word; a request that finds one dead computes what it lacks."""
        stores = (
            WorkerView(
                incarnation=member.incarnation,
                role=member.role,
                model_fingerprint=member.model.fingerprint,
                load=member.load,
            )
            for member in self._directory.members()
            if member.role is Role.STORE
        )
        return ClusterView((*(session.view() for session in self._sessions.sessions()), *stores))

    def _kv_holders(self, holdings: Sequence[Holding]) -> tuple[KvHolder, ...]:
        members = ((self._directory.get(holding.holder.worker_id), holding) for holding in holdings)
        return tuple(
            KvHolder(member=member, num_blocks=holding.num_blocks)
            for member, holding in members
            if member is not None
        )

    def _submit(self, run: Progress, placement: Placement) -> Attempt:
        """Raises SessionClosed if the decode worker has just gone."""
        number = next(self._numbers)
        decode = self._sessions.get(placement.decode)
        prefill = self._sessions.get(placement.prefill) if placement.prefill is not None else None
        assert decode is not None, f"{placement.decode} was picked but has no session"
        assignment = Assignment(
            # A number of our own, because a second attempt must not meet what the first one left behind; with our
            # own name, because other gateways count too.
            request_id=f"{run.generation.request_id[:MAX_REQUEST_ID_CHARS]}#{self._name}-{number}",
            generation=run.generation,
            output_token_ids=tuple(run.merge.token_ids),
            arrival_unix_s=run.arrival_unix_s,
            kv_holders=self._kv_holders(placement.kv_holders),
        )
        run.attempt = Attempt(
            assignment, decode=decode, prefill=prefill, timeout_s=self._settings.request_timeout_s
        )
        try:
            run.attempt.start()
        except SessionClosed:
            run.close_attempt()
            raise
        # Tokens and all later attempts come from one model, or they would not be one text.
        run.model_fingerprint = decode.member.model.fingerprint
        num_pages = run.num_tokens // BLOCK_SIZE_TOKENS + 1
        for session in {decode, run.attempt.computes}:
            num_tokens = placement.num_uncached_tokens if session is run.attempt.computes else 0
            session.note_pick(number, num_tokens=num_tokens, num_pages=num_pages)
        return run.attempt

    def _wait_until_s(self, run: Progress, reason: NoPlacement, *, began_s: float) -> float:
        """Until when somebody may come who can serve this; in the past if nobody may."""
        settings = self._settings
        until_s = -math.inf
        if self._somebody_connects(run):
            until_s = began_s + settings.connect_wait_s
        if not _is_full(run, reason):
            gone_s = self._sessions.absences.since_s(run.model_fingerprint)
            gone_s = max(gone_s, began_s) if reason is NoPlacement.DRAINING else gone_s
            until_s = max(until_s, gone_s + settings.worker_wait_s)
        return min(until_s, began_s + settings.request_timeout_s)

    def _somebody_connects(self, run: Progress) -> bool:
        """Whether a worker that may be able to serve this has joined and not answered hello yet."""
        return any(
            session.member.role.can_decode
            and not session.is_ready
            and session.member.incarnation not in run.excluded
            for session in self._sessions.sessions()
        )

    def _count_failure(self, run: Progress, failure: WorkerFailure) -> None:
        """Closes the attempt, so that the next one is made elsewhere. Raises if none may be made."""
        assert run.attempt is not None, "an attempt failed that was not made"
        lost = run.attempt.decode
        worker_id = lost.worker_id
        log_event(
            _log,
            "attempt_failed",
            level=logging.WARNING,
            request_id=run.generation.request_id,
            worker_id=worker_id,
            code=failure.code.value,
            reason=failure.message,
            num_tokens=len(run.merge.token_ids),
        )
        if failure.code is not FailureCode.LOST:
            run.excluded.add(lost)  # one that is lost is welcome if it can be reached again
        run.close_attempt()
        run.last_failure = failure
        if failure.code is FailureCode.INVALID:
            raise InvalidRequest(failure.message)
        if failure.code in (FailureCode.OVERLOADED, FailureCode.UNAVAILABLE):
            return  # nothing went wrong, so nothing is retried; the number of workers bounds this
        if failure.code is FailureCode.LOST:
            run.suspicion.note(lost, num_tokens=len(run.merge.token_ids))
        run.num_retries += 1
        if run.num_retries > self._settings.max_retries:
            raise GenerationFailed(
                f"{run.num_retries} workers failed, the last one ({worker_id}): {failure.message}"
            )

    def _nobody_error(self, run: Progress, reason: NoPlacement) -> RequestError:
        failure = run.last_failure
        if _is_full(run, reason):
            retry_after_s = failure.retry_after_s if failure is not None else 0.0
            tenant = Tenant(run.generation.tenant, run.generation.tenant_weight)
            return QueueFull(
                f"{NoPlacement.OVERLOADED.value}; try again later",
                retry_after_s=retry_after_s or self.admission.retry_after_s(tenant),
            )
        if failure is not None and (failure.code is FailureCode.INTERNAL or run.merge.token_ids):
            return GenerationFailed(f"{failure.message}, and no other worker can go on")
        return NoWorkers(reason.value, retry_after_s=NO_WORKERS_RETRY_AFTER_S)


def _is_full(run: Progress, reason: NoPlacement) -> bool:
    """Somebody is there and has too much to do. Who has tokens already was not refused: it waits for its worker."""
    if run.merge.token_ids:
        return False
    failure = run.last_failure
    was_refused = failure is not None and failure.code is FailureCode.OVERLOADED
    return was_refused or reason is NoPlacement.OVERLOADED
