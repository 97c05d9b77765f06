"""What a worker holds, and what the directory has yet to hear of it. Pure; in portions that fit a heartbeat.

A block is announced with the fastest tier that holds it, and only when that changed since it was last announced.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from kvstore.blocks import BlockKey
from kvstore.tiers.tier import Tier

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
    """All of it is used by one thread.

    A held block is settled, if the directory knows its fastest tier, or pending. What was heard of and is gone is
    pending too; what came and went unheard is forgotten. So there is never more than the tiers hold, and held when
    the directory last listened.
    """

    def __init__(self) -> None:
        self._settled: dict[BlockKey, int] = {}
        self._pending: dict[BlockKey, int] = {}
        self._heard: dict[BlockKey, int] = {}  # of what is pending
        self._is_new = True

    @property
    def num_pending(self) -> int:
        """Blocks of which the directory has yet to hear, if only that nothing changed."""
        return len(self._pending)

    def note(self, tier: Tier, *, stored: Iterable[BlockKey] = (), removed: Iterable[BlockKey] = ()) -> None:
        """What a tier holds from now on, and what no longer."""
        bit = 1 << tier
        for key in removed:
            self._change(key, self._bits(key) & ~bit)
        for key in stored:
            self._change(key, self._bits(key) | bit)

    def tier(self, key: BlockKey) -> Tier | None:
        """The fastest that holds it."""
        fastest = _FASTEST[self._bits(key)]
        return _TIERS[fastest] if fastest else None

    def restart(self) -> None:
        """The next `take_changes` starts over with everything that is held."""
        self._is_new = True
        for key in self._heard:
            if not self._pending[key]:
                del self._pending[key]
        self._heard = {}
        # No walk through all that is held where there is much of it: the smaller part joins the larger.
        more, fewer = self._settled, self._pending
        if len(more) < len(fewer):
            more, fewer = fewer, more
        more.update(fewer)
        self._pending, self._settled = more, {}

    def take_changes(self, max_keys: int) -> HoldingChanges:
        """The next changes, oldest first; they count as heard. 0.7 us a key, where they are 300,000."""
        snapshot, self._is_new = self._is_new, False
        keys = list(itertools.islice(self._pending, max_keys))
        stored: list[BlockKey] = []
        tiers: list[Tier] = []
        removed: list[BlockKey] = []
        for key in keys:
            bits, heard = self._pending.pop(key), self._heard.pop(key, 0)
            if bits:
                self._settled[key] = bits
                if _FASTEST[bits] != heard:
                    stored.append(key)
                    tiers.append(_TIERS[_FASTEST[bits]])
            else:
                removed.append(key)
        return HoldingChanges(
            snapshot=snapshot, stored=tuple(stored), tiers=tuple(tiers), removed=tuple(removed)
        )

    def check(self) -> None:
        """That a block is in one place, and only what was heard of outlives its tiers."""
        assert not self._settled.keys() & self._pending.keys()
        assert self._heard.keys() <= self._pending.keys()
        assert 0 not in self._settled.values()
        assert 0 not in self._heard.values()
        gone = {key for key, bits in self._pending.items() if not bits}
        assert gone <= self._heard.keys()
        assert not self._is_new or not (self._settled or self._heard)

    def _bits(self, key: BlockKey) -> int:
        return self._settled.get(key) or self._pending.get(key, 0)

    def _change(self, key: BlockKey, bits: int) -> None:
        if key in self._pending:
            if bits or key in self._heard:
                self._pending[key] = bits
            else:
                del self._pending[key]
            return
        heard = _FASTEST[self._settled.get(key, 0)]
        if _FASTEST[bits] == heard:
            if bits:
                self._settled[key] = bits
            return
        if heard:
            del self._settled[key]
            self._heard[key] = heard
        self._pending[key] = bits
