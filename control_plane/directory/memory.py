"""The directory itself, in memory. Every method takes the time as an argument and none waits."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from control_plane.directory.block_events import BlockEvents
from control_plane.directory.block_index import BlockIndex
from control_plane.directory.errors import StaleEpoch, UnknownWorker
from control_plane.directory.member import Incarnation, Member, Role, WorkerId, WorkerLoad

# Epochs are random, so "older" can only mean "seen before": so many are remembered, of so many workers.
MAX_REMEMBERED_EPOCHS = 8
MAX_REMEMBERED_WORKERS = 4096
# 20 bytes each with up to 32 workers, taken as they are used.
MAX_BLOCKS = 1 << 22


class ChangeKind(Enum):
    JOINED = "joined"
    UPDATED = "updated"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Change:
    kind: ChangeKind
    member: Member


Listener = Callable[[Change], None]


class MemoryDirectory:
    """Members stay for `ttl_s` after their last sign of life; the silent ones leave when `expire` is called.

    Listeners are called at once and in order, when the change is visible in `members` already.
    """

    def __init__(self, *, ttl_s: float, max_blocks: int = MAX_BLOCKS) -> None:
        if ttl_s <= 0:
            raise ValueError(f"ttl_s must be positive, got {ttl_s}")
        self.ttl_s = ttl_s
        self._members: dict[WorkerId, Member] = {}
        self._last_seen_s: dict[WorkerId, float] = {}
        self._postponed: set[WorkerId] = set()  # and not heard of since
        self._epochs: OrderedDict[WorkerId, list[int]] = OrderedDict()
        self._listeners: list[Listener] = []
        self.blocks = BlockIndex(max_blocks=max_blocks)
        self.num_format_mismatches = 0  # reports about blocks that carry names of another format

    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    def get(self, worker_id: WorkerId) -> Member | None:
        return self._members.get(worker_id)

    def stores_for(self, worker_id: WorkerId) -> tuple[Member, ...]:
        """The stores that take blocks of this worker's model, or of any; a store itself offers blocks to nobody.

        For a worker that drains, and where there is no store: the others of its pool.
        """
        member = self._members.get(worker_id)
        if member is None or member.role is Role.STORE:
            return ()
        takers = [
            other
            for other in self._members.values()
            if other.role in (Role.STORE, member.role)
            and not other.is_draining
            and other.model.fingerprint in (b"", member.model.fingerprint)
        ]
        stores = tuple(taker for taker in takers if taker.role is Role.STORE)
        return stores or (tuple(takers) if member.is_draining else ())

    def replaced_epochs(self, worker_id: WorkerId) -> tuple[int, ...]:
        """Those that the last registered one took the place of, oldest first, as far as they are remembered."""
        return tuple(self._epochs.get(worker_id, ())[:-1])

    def register(self, member: Member, *, now_s: float) -> None:
        """Takes the place of any other incarnation. Raises StaleEpoch if this one was replaced before."""
        self._refuse_replaced(member.incarnation)
        self.adopt(member, now_s=now_s)

    def adopt(self, member: Member, *, now_s: float) -> None:
        """As `register`, for a member of whom somebody else has made sure that it is the newest."""
        self._remember_epoch(member)
        current = self._members.get(member.worker_id)
        if current is not None and (current.epoch, current.role) != (member.epoch, member.role):
            self._leave(current)
            current = None
        self._members[member.worker_id] = member
        self._heard(member.worker_id, now_s=now_s)
        self._tell(ChangeKind.JOINED if current is None else ChangeKind.UPDATED, member)

    def heartbeat(
        self, incarnation: Incarnation, *, load: WorkerLoad, blocks: BlockEvents | None, now_s: float
    ) -> bool:
        """Renews the registration. True: the worker must send a snapshot of its blocks.

        Raises UnknownWorker or StaleEpoch.
        """
        member = self._members.get(incarnation.worker_id)
        if member is None:
            raise UnknownWorker(f"{incarnation} is not registered; register it again")
        self._refuse_other_epoch(member, incarnation)
        member = replace(member, load=load)
        self._members[member.worker_id] = member
        self._heard(member.worker_id, now_s=now_s)
        resend = blocks is not None and not self._apply(member, blocks)
        self._tell(ChangeKind.UPDATED, member)
        return resend

    def deregister(self, incarnation: Incarnation) -> None:
        """Idempotent. Raises StaleEpoch if another incarnation is registered."""
        member = self._members.get(incarnation.worker_id)
        if member is not None:
            self._refuse_other_epoch(member, incarnation)
            self._leave(member)

    def supersede(self, incarnation: Incarnation, *, epoch: int) -> None:
        """Another incarnation is known elsewhere to have taken the place of this one, which leaves."""
        member = self._members.get(incarnation.worker_id)
        if member is not None and member.epoch == incarnation.epoch:
            self._note_epoch(incarnation.worker_id, epoch)
            self._leave(member)

    def spare(self, worker_id: WorkerId, *, now_s: float) -> None:
        """Counts as a sign of life of this member."""
        if worker_id in self._members:
            self._heard(worker_id, now_s=now_s)

    def expire(self, *, now_s: float) -> tuple[Member, ...]:
        """Removes those who have been silent for `ttl_s` and returns them."""
        silent = tuple(
            self._members[worker_id]
            for worker_id, seen_s in self._last_seen_s.items()
            if now_s - seen_s >= self.ttl_s
        )
        for member in silent:
            self._leave(member)
        return silent

    def postpone_expiry(self, *, until_s: float) -> None:
        """Nobody leaves before `until_s`, because the directory itself was held up and heard nobody.

        Only once for a worker that is then not heard of: a dead one leaves, however often this is called.
        """
        for worker_id, seen_s in self._last_seen_s.items():
            if seen_s < until_s - self.ttl_s and worker_id not in self._postponed:
                self._last_seen_s[worker_id] = until_s - self.ttl_s
                self._postponed.add(worker_id)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Calls `listener` with every later change; returns what ends the subscription."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def check(self) -> None:
        """Raises AssertionError where the bookkeeping does not hold."""
        assert self._members.keys() == self._last_seen_s.keys(), "members and their times differ"
        assert self._postponed <= self._members.keys(), "the expiry of somebody who has left is postponed"
        for worker_id, member in self._members.items():
            assert worker_id == member.worker_id, f"{member.worker_id} is filed under {worker_id}"
            assert self._epochs[worker_id][-1] == member.epoch, f"{worker_id} has an epoch of the past"
        assert len(self._epochs) <= max(MAX_REMEMBERED_WORKERS, len(self._members)), "too many epochs"
        self.blocks.check()

    def _apply(self, member: Member, blocks: BlockEvents) -> bool:
        if not member.has_our_blocks:
            self.num_format_mismatches += 1
            return True  # it has nothing to send that would be of use
        return self.blocks.apply(member.worker_id, blocks)

    def _refuse_replaced(self, incarnation: Incarnation) -> None:
        epochs = self._epochs.get(incarnation.worker_id, [])
        if incarnation.epoch in epochs[:-1]:
            raise StaleEpoch(f"{incarnation} was replaced by epoch {epochs[-1]}")

    def _remember_epoch(self, member: Member) -> None:
        self._note_epoch(member.worker_id, member.epoch)
        self._epochs.move_to_end(member.worker_id)
        if len(self._epochs) > MAX_REMEMBERED_WORKERS:
            forgotten = next((known for known in self._epochs if known not in self._members), None)
            if forgotten is not None and forgotten != member.worker_id:
                del self._epochs[forgotten]

    def _note_epoch(self, worker_id: WorkerId, epoch: int) -> None:
        epochs = self._epochs.setdefault(worker_id, [])
        if epoch in epochs:
            epochs.remove(epoch)
        epochs.append(epoch)
        del epochs[:-MAX_REMEMBERED_EPOCHS]

    def _refuse_other_epoch(self, member: Member, incarnation: Incarnation) -> None:
        if member.epoch != incarnation.epoch:
            raise StaleEpoch(f"{incarnation} is not the registered one, which has epoch {member.epoch}")

    def _heard(self, worker_id: WorkerId, *, now_s: float) -> None:
        self._last_seen_s[worker_id] = now_s
        self._postponed.discard(worker_id)

    def _leave(self, member: Member) -> None:
        del self._members[member.worker_id]
        del self._last_seen_s[member.worker_id]
        self._postponed.discard(member.worker_id)
        self.blocks.forget(member.worker_id)
        self._tell(ChangeKind.LEFT, member)

    def _tell(self, kind: ChangeKind, member: Member) -> None:
        change = Change(kind, member)
        for listener in tuple(self._listeners):
            listener(change)
