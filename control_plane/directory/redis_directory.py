"""A directory that several gateways share. Each has all of it in memory; a Redis stream carries what one of them hears.

A worker speaks to one gateway, which knows it at first hand: what it says counts at once there and is written to
the stream, and the others apply it when they read it. So nothing here ever waits for Redis, and without Redis
every gateway goes on with what it knows:

- Who has missed something, asks for it and tells in turn all that he knows at first hand: members at once, blocks
  when the worker has been asked for a snapshot. That is the one repair, whatever was lost.
- Members of another gateway are let go only while the stream demonstrably works and says nothing of them. While
  it does not, their sessions tell who is dead, and those of our own members too: they may have gone to another.
- Which incarnation of a worker is the newest is settled where the order of all registrations is known, in Redis
  (`redis_link`); without Redis by each gateway for itself, and again when it is back.

No I/O here: `redis_link` takes what is to be written and brings what was read.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from control_plane.directory import wire
from control_plane.directory.block_events import BlockEvents
from control_plane.directory.errors import StaleEpoch, UnknownWorker
from control_plane.directory.member import Incarnation, Member, WorkerId, WorkerLoad
from control_plane.directory.memory import Listener, MemoryDirectory
from control_plane.directory.stream_entries import Entry, Kind
from control_plane.directory.witnesses import Witnesses
from protos import directory_pb2

# What waits to be written, at most some 30 MB; more is dropped, which the missing numbers tell the others.
MAX_WAITING_ENTRIES = 4096
# An entry brings so many blocks at most, and a gateway that reads it is held up for less than 1 ms.
MAX_BLOCKS_PER_ENTRY = 512
# Registrations are written again so often: Redis may have lost which incarnations were replaced.
REANNOUNCE_S = 30.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """That this incarnation is the newest of its worker, and which ones it has replaced."""

    incarnation: Incarnation
    replaced_epochs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outgoing:
    entry: Entry
    claim: Claim | None = None  # with a registration: the entry is written only if the claim holds


class RedisDirectory:
    """A `Directory` (server.py) over `memory`, which routing and sessions go on to read. Used from one event loop.

    `is_reached`: whether this gateway has an open session with that worker.
    """

    def __init__(
        self, memory: MemoryDirectory, *, gateway_id: str, is_reached: Callable[[Incarnation], bool]
    ) -> None:
        self.memory = memory
        self.gateway_id = gateway_id
        self._is_reached = is_reached
        self.has_outgoing = asyncio.Event()
        self._outgoing: deque[Outgoing] = deque()
        self._num_written = 0
        self._is_linked = False
        self._witnesses = Witnesses(gateway_id=gateway_id, ttl_s=memory.ttl_s)
        # The numbers of the entries of claims that are on their way through the stream.
        self._claims: dict[WorkerId, int] = {}
        self._to_ask: set[WorkerId] = set()  # for a snapshot, at their next heartbeat
        self._owes_blocks = False
        self._asked_workers_s = float("-inf")
        self._announced_s = 0.0

    @property
    def ttl_s(self) -> float:
        return self.memory.ttl_s

    def members(self) -> tuple[Member, ...]:
        return self.memory.members()

    def stores_for(self, worker_id: WorkerId) -> tuple[Member, ...]:
        return self.memory.stores_for(worker_id)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        return self.memory.subscribe(listener)

    def postpone_expiry(self, *, until_s: float) -> None:
        self.memory.postpone_expiry(until_s=until_s)

    # What workers say to this gateway.

    def register(self, member: Member, *, now_s: float) -> None:
        self.memory.register(member, now_s=now_s)
        self._witnesses.heard(member.worker_id, through=self.gateway_id, now_s=now_s)
        self._claim(member)

    def heartbeat(
        self, incarnation: Incarnation, *, load: WorkerLoad, blocks: BlockEvents | None, now_s: float
    ) -> bool:
        resend = self.memory.heartbeat(incarnation, load=load, blocks=blocks, now_s=now_s)
        worker_id = incarnation.worker_id
        self._witnesses.heard(worker_id, through=self.gateway_id, now_s=now_s)
        # What was not recorded here is of no use to the others either: a snapshot follows.
        known = blocks if blocks is not None and not resend else None
        for part in known.parts(MAX_BLOCKS_PER_ENTRY) if known is not None else (None,):
            message = wire.write_heartbeat(incarnation, load=load, blocks=part)
            self._write(Kind.HEARTBEAT, message.SerializeToString())
        if worker_id in self._to_ask:
            self._to_ask.discard(worker_id)
            return True
        return resend

    def deregister(self, incarnation: Incarnation) -> None:
        self.memory.deregister(incarnation)
        self._forget(incarnation.worker_id)
        self._write(Kind.GOODBYE, _goodbye(incarnation))

    def expire(self, *, now_s: float) -> tuple[Member, ...]:
        for member in self.memory.members():
            is_reached = self._is_reached(member.incarnation)
            if not self._witnesses.may_be_dead(member.worker_id, now_s=now_s, is_reached=is_reached):
                self.memory.spare(member.worker_id, now_s=now_s)
        silent = self.memory.expire(now_s=now_s)
        for member in silent:
            if self._witnesses.is_ours(member.worker_id):
                self._write(Kind.SILENT, _goodbye(member.incarnation))
            self._forget(member.worker_id)
        return silent

    # What the link does.

    def link_up(self, *, now_s: float) -> None:
        """From now on entries are written: first all that we know at first hand, and that we ask for the rest."""
        self._is_linked = True
        self._ask_everybody(now_s=now_s)
        self._tell_all(now_s=now_s)

    def link_lost(self) -> None:
        """What waits is dropped; who reads the next entry misses it and asks."""
        self._is_linked = False
        self._outgoing.clear()
        self._claims.clear()

    def beat(self, *, now_s: float) -> None:
        """A sign of life, as often as workers give theirs."""
        self._write(Kind.HERE)
        if now_s - self._announced_s >= REANNOUNCE_S:
            self._announce(now_s=now_s)
        self._ask_workers(now_s=now_s)

    def take_outgoing(self, max_entries: int) -> list[Outgoing]:
        """The next entries, in order. Those that cannot be written are lost."""
        taken = [self._outgoing.popleft() for _ in range(min(max_entries, len(self._outgoing)))]
        if not self._outgoing:
            self.has_outgoing.clear()
        return taken

    def claim_failed(self, claim: Claim) -> None:
        """Nobody knows whether it holds; it is made again with the next announcement."""
        self._claims.pop(claim.incarnation.worker_id, None)

    def claim_refused(self, claim: Claim, *, newest_epoch: int, now_s: float) -> None:
        """Another gateway has a newer incarnation, of which we must have missed the registration."""
        self._claims.pop(claim.incarnation.worker_id, None)
        self.memory.supersede(claim.incarnation, epoch=newest_epoch)
        self._forget(claim.incarnation.worker_id)
        self._ask_everybody(now_s=now_s)

    def receive(self, entry: Entry, *, now_s: float) -> None:
        """Applies what was read from the stream, our own entries included: they show that it works."""
        missed = self._witnesses.saw(entry.gateway_id, number=entry.number, now_s=now_s)
        if missed is None:
            return  # a second time
        if entry.gateway_id == self.gateway_id:
            self._receive_own(entry)
            return
        if missed and not entry.starts_over and self._ask(entry.gateway_id, now_s=now_s):
            self._tell_all(now_s=now_s)  # what was missed may have been a question
        try:
            self._apply(entry, now_s=now_s)
        except (ValueError, DecodeError) as error:
            fields = {"gateway_id": entry.gateway_id, "kind": entry.kind.value, "reason": str(error)}
            _log.warning("directory_entry_malformed", extra={"fields": fields})

    def check(self) -> None:
        self.memory.check()
        assert len(self._outgoing) <= MAX_WAITING_ENTRIES, f"{len(self._outgoing)} entries wait"

    def _apply(self, entry: Entry, *, now_s: float) -> None:
        match entry.kind:
            case Kind.REGISTER:
                request = directory_pb2.RegisterRequest.FromString(entry.body)
                self._apply_registration(wire.read_member(request.worker), entry, now_s=now_s)
            case Kind.HEARTBEAT:
                heartbeat = directory_pb2.HeartbeatRequest.FromString(entry.body)
                self._apply_heartbeat(heartbeat, entry, now_s=now_s)
            case Kind.GOODBYE | Kind.SILENT:
                goodbye = directory_pb2.DeregisterRequest.FromString(entry.body)
                self._apply_goodbye(wire.read_incarnation(goodbye), entry)
            case Kind.RESEND:
                if entry.body.decode() in ("", self.gateway_id):
                    self._tell_all(now_s=now_s)
            case Kind.HERE:
                pass

    def _apply_registration(self, member: Member, entry: Entry, *, now_s: float) -> None:
        if member.worker_id in self._claims:
            return  # ours is behind it in the stream, so ours is the newer one
        if self._is_at_first_hand(member.incarnation):
            return  # what the worker itself says to us is newer
        self.memory.adopt(member, now_s=now_s)
        self._witnesses.heard(member.worker_id, through=entry.gateway_id, now_s=now_s)

    def _apply_heartbeat(
        self, message: directory_pb2.HeartbeatRequest, entry: Entry, *, now_s: float
    ) -> None:
        incarnation = wire.read_incarnation(message)
        try:
            has_gap = self.memory.heartbeat(
                incarnation, load=wire.read_load(message.load), blocks=wire.read_blocks(message), now_s=now_s
            )
        except UnknownWorker:
            self._ask(entry.gateway_id, now_s=now_s)
        except StaleEpoch:
            pass  # it was replaced, and is told so where it speaks
        else:
            self._witnesses.heard(incarnation.worker_id, through=entry.gateway_id, now_s=now_s)
            if has_gap:
                self._ask(entry.gateway_id, now_s=now_s)

    def _apply_goodbye(self, incarnation: Incarnation, entry: Entry) -> None:
        worker_id = incarnation.worker_id
        has_moved = not self._witnesses.is_through(worker_id, entry.gateway_id)
        member = self.memory.get(worker_id)
        if member is None or member.epoch != incarnation.epoch or (entry.kind is Kind.SILENT and has_moved):
            return
        self.memory.deregister(incarnation)
        self._forget(worker_id)

    def _receive_own(self, entry: Entry) -> None:
        landed = [worker_id for worker_id, number in self._claims.items() if number <= entry.number]
        for worker_id in landed:
            del self._claims[worker_id]

    def _is_at_first_hand(self, incarnation: Incarnation) -> bool:
        member = self.memory.get(incarnation.worker_id)
        is_same = member is not None and member.epoch == incarnation.epoch
        return is_same and self._witnesses.is_ours(incarnation.worker_id)

    def _tell_all(self, *, now_s: float) -> None:
        """What we know at first hand: members now, blocks as soon as their workers have sent them again."""
        self._announce(now_s=now_s)
        self._owes_blocks = True
        self._ask_workers(now_s=now_s)

    def _ask_workers(self, *, now_s: float) -> None:
        """Once in a ttl: gateways that link up one after the other all ask, and a snapshot may be large."""
        if self._owes_blocks and now_s - self._asked_workers_s >= self.ttl_s:
            self._owes_blocks, self._asked_workers_s = False, now_s
            self._to_ask.update(member.worker_id for member in self._own_members())

    def _announce(self, *, now_s: float) -> None:
        self._announced_s = now_s
        for member in self._own_members():
            self._claim(member)

    def _own_members(self) -> list[Member]:
        return [member for member in self.memory.members() if self._witnesses.is_ours(member.worker_id)]

    def _claim(self, member: Member) -> None:
        request = directory_pb2.RegisterRequest(worker=wire.write_member(member))
        replaced = self.memory.replaced_epochs(member.worker_id)
        claim = Claim(incarnation=member.incarnation, replaced_epochs=replaced)
        if self._is_linked:
            self._claims[member.worker_id] = self._num_written + 1
        self._write(Kind.REGISTER, request.SerializeToString(), claim=claim)

    def _ask(self, gateway_id: str, *, now_s: float) -> bool:
        """Whether it was not asked only just now."""
        may_ask = self._witnesses.may_ask(gateway_id, now_s=now_s)
        if may_ask:
            self._write(Kind.RESEND, gateway_id.encode())
        return may_ask

    def _ask_everybody(self, *, now_s: float) -> None:
        self._witnesses.asks_everybody(now_s=now_s)
        self._write(Kind.RESEND)

    def _forget(self, worker_id: WorkerId) -> None:
        self._witnesses.forget(worker_id)
        self._to_ask.discard(worker_id)

    def _write(self, kind: Kind, body: bytes = b"", *, claim: Claim | None = None) -> None:
        """What is not written has its number all the same, so that it is missed."""
        self._num_written += 1
        if not self._is_linked:
            return
        if len(self._outgoing) >= MAX_WAITING_ENTRIES:
            self._outgoing.clear()
            self._claims.clear()
            return
        entry = Entry(gateway_id=self.gateway_id, number=self._num_written, kind=kind, body=body)
        self._outgoing.append(Outgoing(entry=entry, claim=claim))
        self.has_outgoing.set()


def _goodbye(incarnation: Incarnation) -> bytes:
    message = directory_pb2.DeregisterRequest(worker_id=incarnation.worker_id, epoch=incarnation.epoch)
    return message.SerializeToString()
