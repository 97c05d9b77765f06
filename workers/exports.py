"""The source's side of a hand-over: what may be pulled, by whom, and until when.

An export is opened when a request is submitted, before it has pages, so that a puller can wait for it here. Its
lease starts to run out when everything is computed: until then the request holds its pages for its own sake.

The export of a request that moves while it runs (`open_live`) is another matter: it is opened for its puller, and ends
as soon as that has gone or does nothing for a short while, so that the request goes on here.
All methods run in the thread of the event loop.
"""

import asyncio
import logging
import math
import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.data_plane import Connection, FrameBuffer
from kvstore.errors import TransferError
from kvstore.transfer import (
    MIN_KEEP_ALIVE_S,
    TICKET_BYTES,
    BlockMemory,
    Outgoing,
    Sender,
    staging_bytes,
)
from workers.handoff_wire import encode_handoff
from workers.reports import ExportProgress
from workers.request import Handoff, PageId, RequestId

logger = logging.getLogger(__name__)


class NoSuchExport(Exception):
    """No request of this id can be pulled: never submitted here, given up, released, or its lease is over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportLimits:
    lease_s: float  # after the end of the prefill, without progress of the puller
    live_lease_s: float = 2.0  # of a request that moves: its client waits meanwhile
    open_wait_s: float = 2.0  # a pull may come that much before its request
    keep_alive_s: float = 1.0  # how often a puller hears from a source that has nothing to send
    max_waiting_pulls: int = 1024
    num_remembered: int = 4096  # requests given up lately, whose pulls fail at once

    def __post_init__(self) -> None:
        if self.keep_alive_s < MIN_KEEP_ALIVE_S:
            raise ValueError(f"keep_alive_s must be at least {MIN_KEEP_ALIVE_S}, got {self.keep_alive_s}")
        for name in ("lease_s", "live_lease_s", "open_wait_s", "max_waiting_pulls", "num_remembered"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class IssuedTicket:
    ticket: bytes
    num_blocks: int


@dataclass(kw_only=True, slots=True, eq=False)
class _Export:
    request_id: RequestId
    num_tokens: int | None  # of the prompt; None: of a request that moves while it runs nobody knows yet
    outgoing: Outgoing
    ticket: bytes | None = None  # issued and not used yet
    first_block: int = 0  # that the ticket is for
    is_pulled: bool = False  # somebody has asked for it, and has not gone
    connection: Connection | None = None  # of the last one who came with a ticket
    is_released: bool = False  # the puller wants no more
    is_finished: bool = False  # everything is computed, the lease runs
    lease_ends_s: float = 0.0
    lease_timer: asyncio.TimerHandle | None = None

    @property
    def is_live(self) -> bool:
        return self.num_tokens is None

    @property
    def has_lease(self) -> bool:
        return self.is_finished or self.is_live


class Exports:
    """All requests of this worker that others may pull.

    One of `on_released` and `on_expired` is called when an export that was finished, or is live, is gone, unless by
    `close`. `on_caught_up` is called, again and again, when the puller of a live export has all that is ready.
    """

    def __init__(
        self,
        memory: BlockMemory,
        *,
        limits: ExportLimits,
        on_released: Callable[[RequestId], None],
        on_expired: Callable[[RequestId], None],
        on_caught_up: Callable[[RequestId], None] = lambda request_id: None,
    ) -> None:
        self._memory = memory
        self._limits = limits
        self._on_released = on_released
        self._on_expired = on_expired
        self._on_caught_up = on_caught_up
        self._exports: dict[RequestId, _Export] = {}
        self._by_ticket: dict[bytes, _Export] = {}
        self._gone: OrderedDict[RequestId, None] = OrderedDict()
        self._num_waiting = 0
        self._changed = asyncio.Event()  # set, and replaced, when an export comes or goes

    @property
    def num_open(self) -> int:
        return len(self._exports)

    @property
    def num_leases(self) -> int:
        """Finished and kept for a puller."""
        return sum(export.is_finished for export in self._exports.values())

    @property
    def num_waiting_pulls(self) -> int:
        """Pulls that came before their request."""
        return self._num_waiting

    def is_pulled(self, request_id: RequestId) -> bool:
        """Somebody has pages for it and has asked for it."""
        export = self._exports.get(request_id)
        return export is not None and export.is_pulled

    def open(self, request_id: RequestId, *, num_prompt_tokens: int) -> None:
        """From now on the request can be pulled."""
        num_blocks = math.ceil(num_prompt_tokens / self._memory.layout.block_size_tokens)
        self._open(request_id, num_tokens=num_prompt_tokens, num_blocks=num_blocks)

    def open_live(self, request_id: RequestId, *, max_blocks: int) -> None:
        """From now on the request can be pulled while it runs, by one who has room for so many blocks."""
        self._renew(self._open(request_id, num_tokens=None, num_blocks=max_blocks))

    def _open(self, request_id: RequestId, *, num_tokens: int | None, num_blocks: int) -> _Export:
        if request_id in self._exports:
            raise ValueError(f"request {request_id} is exported already")
        export = self._exports[request_id] = _Export(
            request_id=request_id,
            num_tokens=num_tokens,
            outgoing=Outgoing(num_layers=self._memory.layout.num_layers, num_blocks=num_blocks),
        )
        self._gone.pop(request_id, None)
        self._notify()
        return export

    def progress(self, progress: ExportProgress) -> None:
        """To be called after every step. With the `handoff` the lease begins; `on_released` may be called at once.

        Here and below an unknown id is ignored: its export may have ended a moment ago.
        """
        export = self._exports.get(progress.request_id)
        if export is None or export.is_finished:
            return
        num_blocks = self._num_blocks(export, progress.num_computed_tokens)
        if export.is_live and progress.handoff is not None:
            num_blocks = math.ceil(progress.num_computed_tokens / self._memory.layout.block_size_tokens)
        export.outgoing.advance(page_ids=progress.page_ids, num_blocks=num_blocks)
        if progress.handoff is not None:
            self._finish(export, progress.handoff)

    def layer_progress(
        self, request_id: RequestId, *, page_ids: Sequence[PageId], num_ready_tokens: int, num_layers: int
    ) -> None:
        """Inside a running step: the first `num_layers` layers hold the KV of the first `num_ready_tokens`."""
        export = self._exports.get(request_id)
        if export is not None and not export.is_finished:
            num_blocks = self._num_blocks(export, num_ready_tokens)
            export.outgoing.advance(page_ids=page_ids, num_blocks=num_blocks, num_layers=num_layers)

    def close(self, request_id: RequestId) -> None:
        """Ends an export without a callback. Idempotent, also before `open`.

        When it returns nobody reads the pages any more. Call it too for a request that is refused, so that its
        puller learns at once.
        """
        export = self._exports.get(request_id)
        if export is not None:
            self._remove(export, reason="the source gave the request up")
        else:
            self._remember(request_id)

    def close_all(self) -> None:
        """For the end of the worker. Calls nothing back."""
        for export in tuple(self._exports.values()):
            self._remove(export, reason="the source is going away")

    def release(self, request_id: RequestId) -> None:
        """The puller wants no more. Idempotent. `on_released` is called as soon as the request is finished.

        Of a request that moves it says that the puller has it; one that cannot have it yet gives it up.
        """
        export = self._exports.get(request_id)
        if export is None:
            return
        if export.is_live and not export.is_finished:
            self._expire(export, reason="the puller gave the request up")
            return
        export.is_released = True
        if export.is_finished:
            self._remove(export, reason="released")
            self._on_released(request_id)

    async def issue_ticket(
        self, request_id: RequestId, *, first_block: int, timeout_s: float
    ) -> IssuedTicket:
        """A ticket for one connection, voiding an earlier one. Waits for a request that is not submitted yet.

        Raises NoSuchExport, and ValueError for a `first_block` that the request does not have.
        """
        export = await self._find(request_id, timeout_s=min(timeout_s, self._limits.open_wait_s))
        num_blocks = export.outgoing.num_blocks
        if not 0 <= first_block <= num_blocks:
            raise ValueError(f"first_block must be between 0 and {num_blocks}, got {first_block}")
        if export.ticket is not None:
            del self._by_ticket[export.ticket]
        export.ticket, export.first_block = secrets.token_bytes(TICKET_BYTES), first_block
        export.is_pulled = True
        self._by_ticket[export.ticket] = export
        self._renew(export)
        return IssuedTicket(ticket=export.ticket, num_blocks=num_blocks)

    async def serve(self, connection: Connection, ticket: bytes) -> bool:
        """Sends the ticket's request. False, at once, if the ticket is none of ours."""
        export = self._by_ticket.pop(ticket, None)
        if export is None:
            return False
        export.ticket, export.connection = None, connection
        try:
            await self._sender(export, connection).run(self._buffer(export))
        except TransferError as error:
            logger.info("hand-over of %s ended early: %s", export.request_id, error)
            if export.ticket is None and export.connection is connection:  # nobody has come in its place
                export.is_pulled = False
            if export.is_live and self._exports.get(export.request_id) is export:
                self._expire(export, reason="the puller has gone")
        return True

    def _num_blocks(self, export: _Export, num_tokens: int) -> int:
        """Blocks that are full, or as full as they get."""
        if export.num_tokens is not None and num_tokens >= export.num_tokens:
            return export.outgoing.num_blocks
        return min(num_tokens // self._memory.layout.block_size_tokens, export.outgoing.num_blocks)

    def _finish(self, export: _Export, handoff: Handoff) -> None:
        state = encode_handoff(handoff)
        if export.is_live:
            export.outgoing.finish_early(state)
        else:
            export.outgoing.finish(state)
        export.is_finished = True
        if export.is_released:
            self._remove(export, reason="released")
            self._on_released(export.request_id)
        else:
            self._renew(export)

    def _sender(self, export: _Export, connection: Connection) -> Sender:
        return Sender(
            connection=connection,
            memory=self._memory,
            outgoing=export.outgoing,
            first_block=export.first_block,
            keep_alive_s=self._limits.keep_alive_s,
            on_progress=lambda: self._renew(export),
            on_caught_up=lambda: self._caught_up(export),
        )

    def _caught_up(self, export: _Export) -> None:
        if export.is_live and not export.is_finished:
            self._renew(export)
            self._on_caught_up(export.request_id)

    def _buffer(self, export: _Export) -> FrameBuffer:
        num_blocks = export.outgoing.num_blocks - export.first_block
        return FrameBuffer(staging_bytes(self._memory.layout, num_blocks=num_blocks))

    async def _find(self, request_id: RequestId, *, timeout_s: float) -> _Export:
        is_known = request_id in self._exports or request_id in self._gone
        if not is_known and self._num_waiting < self._limits.max_waiting_pulls:
            await self._wait_for(request_id, timeout_s=timeout_s)
        export = self._exports.get(request_id)
        if export is None or export.is_released:
            raise NoSuchExport(
                f"request {request_id!r} cannot be pulled: unknown, given up, or its lease is over"
            )
        return export

    async def _wait_for(self, request_id: RequestId, *, timeout_s: float) -> None:
        self._num_waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                while request_id not in self._exports and request_id not in self._gone:
                    await self._changed.wait()
        except TimeoutError:
            return
        finally:
            self._num_waiting -= 1

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _renew(self, export: _Export) -> None:
        if not export.has_lease or self._exports.get(export.request_id) is not export:
            return
        lease_s = self._limits.live_lease_s if export.is_live else self._limits.lease_s
        export.lease_ends_s = asyncio.get_running_loop().time() + lease_s
        if export.lease_timer is None:
            self._watch(export)

    def _watch(self, export: _Export) -> None:
        loop = asyncio.get_running_loop()
        export.lease_timer = loop.call_at(export.lease_ends_s, self._check_lease, export)

    def _check_lease(self, export: _Export) -> None:
        if asyncio.get_running_loop().time() < export.lease_ends_s:
            self._watch(export)
            return
        logger.warning("nobody pulled %s until its lease was over", export.request_id)
        self._expire(export, reason="the lease is over")

    def _expire(self, export: _Export, *, reason: str) -> None:
        self._remove(export, reason=reason)
        self._on_expired(export.request_id)

    def _remove(self, export: _Export, *, reason: str) -> None:
        del self._exports[export.request_id]
        if export.ticket is not None:
            del self._by_ticket[export.ticket]
            export.ticket = None
        if export.lease_timer is not None:
            export.lease_timer.cancel()
        export.outgoing.stop(reason)
        self._remember(export.request_id)

    def _remember(self, request_id: RequestId) -> None:
        self._gone[request_id] = None
        if len(self._gone) > self._limits.num_remembered:
            self._gone.popitem(last=False)
        self._notify()
