"""What a worker holds, and what the directory has yet to hear of it. Pure; in portions that fit a heartbeat.

A block is announced with the fastest tier that holds it, and only when that changed since it was last announced.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from kvstore.blocks import BlockKey
from kvstore.tiers.tier import Tier

# Of keys that came or went unheard, 100 MB. Past it, hearing everything anew is shorter.
MAX_PENDING_KEYS = 2**20

# By a block's bits (bit t: held in tier t), its fastest tier plus one; 0 for none. What was heard is kept likewise.
_FASTEST = bytes((bits & -bits).bit_length() for bits in range(8))
# Not Tier(fastest - 1): that took a third of the time of a large portion.
_TIERS = (Tier.PEER, Tier.DEVICE, Tier.MEMORY, Tier.DISK)


@dataclass(frozen=True, kw_only=True, slots=True)
class HoldingChanges:
    """`snapshot`: what was known before is void. `tiers` has one tier, the fastest, for each of `stored`."""

    snapshot: bool = False
    stored: tuple[BlockKey, ...] = ()
    tiers: tuple[Tier, ...] = ()
    removed: tuple[BlockKey, ...] = ()


class Holdings:
    """All of it is used by one thread."""

    def __init__(self, *, max_pending_keys: int = MAX_PENDING_KEYS) -> None:
        self._max_pending_keys = max_pending_keys
        self._held: dict[BlockKey, int] = {}
        self._heard: dict[BlockKey, int] = {}
        self._snapshot: list[BlockKey] = []  # goes before what is pending; oldest last
        self._pending: dict[BlockKey, None] = {}
        self._restart = True

    def note(self, tier: Tier, *, stored: Iterable[BlockKey] = (), removed: Iterable[BlockKey] = ()) -> None:
        """What a tier holds from now on, and what no longer."""
        bit = 1 << tier
        for key in removed:
            self._change(key, self._held.get(key, 0) & ~bit)
        for key in stored:
            self._change(key, self._held.get(key, 0) | bit)
        if len(self._pending) > max(self._max_pending_keys, len(self._held)):
            self.restart()

    def tier(self, key: BlockKey) -> Tier | None:
        """The fastest that holds it."""
        fastest = _FASTEST[self._held.get(key, 0)]
        return _TIERS[fastest] if fastest else None

    def restart(self) -> None:
        """The next `take_changes` starts over with everything that is held."""
        self._restart = True
        self._snapshot, self._pending = [], {}

    def take_changes(self, max_keys: int) -> HoldingChanges:
        """The next changes, oldest first; they count as heard."""
        snapshot, self._restart = self._restart, False
        if snapshot:
            self._heard = {}
            self._snapshot = list(reversed(self._held))
        stored: list[BlockKey] = []
        tiers: list[Tier] = []
        removed: list[BlockKey] = []
        held, heard = self._held, self._heard
        for key in self._next(max_keys):
            fastest = _FASTEST[held.get(key, 0)]
            if fastest == heard.get(key, 0):
                continue
            if fastest:
                heard[key] = fastest
                stored.append(key)
                tiers.append(_TIERS[fastest])
            else:
                del heard[key]
                removed.append(key)
        return HoldingChanges(
            snapshot=snapshot, stored=tuple(stored), tiers=tuple(tiers), removed=tuple(removed)
        )

    def check(self) -> None:
        """That whatever the directory should hear and has not is on its way to it."""
        assert 0 not in self._held.values()
        assert self._heard.keys() <= self._held.keys() | self._pending.keys() or self._restart
        if not self._restart:
            coming = self._pending.keys() | set(self._snapshot)
            for key, bits in self._held.items():
                assert self._heard.get(key) == _FASTEST[bits] or key in coming

    def _next(self, max_keys: int) -> list[BlockKey]:
        if self._snapshot:
            keys = self._snapshot[-max_keys:]
            del self._snapshot[-max_keys:]
            return keys[::-1]
        if len(self._pending) <= max_keys:
            pending, self._pending = self._pending, {}
            return list(pending)
        keys = list(itertools.islice(self._pending, max_keys))
        for key in keys:
            del self._pending[key]
        return keys

    def _change(self, key: BlockKey, bits: int) -> None:
        if bits:
            self._held[key] = bits
        else:
            self._held.pop(key, None)
        if not self._restart:
            self._pending[key] = None
