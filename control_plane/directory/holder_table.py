"""Which of many holders has which blocks, in arrays: a set-associative table, as the cache of a processor is one.

A digest belongs to one set of `WAYS` places. In its place stand 8 bytes of it, when it was last of use, and two
bits for each holder: nothing, device, memory or disk. So a block takes 12 bytes and 8 more for each 32 holders,
however many of them hold it, and nothing moves, grows or is cleaned up. In a full set a new block takes the
place of the one of least use: that nobody holds; else that was neither announced nor looked up for the longest
time; among equals one that is in no device pages.

Sets are uneven: a table begins to forget at about 60 % of `num_places`, and at 73 % it has forgotten 2 %. Memory
that was never touched is not taken from the system.

3 million blocks of 8 holders in 4 million places: 28 bytes a block. Lookups of 512: 4.7 million blocks a second
for all holders together; stores of 512 new ones: 0.6 million a second (one of two busy cores of a server).
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvstore.blocks import DIGEST_BYTES

WAYS = 16
HOLDERS_PER_PLANE = 32
# Lookups go on in portions, so that a short overlap with a long prompt costs little.
FIRST_LOOKUP_BLOCKS, LOOKUP_BLOCKS = 64, 2048

Digests = npt.NDArray[np.uint64]  # [number, 2]
Places = npt.NDArray[np.int64]
Codes = npt.NDArray[np.uint64]

_U64 = np.uint64
_HELD_BITS = _U64(0x5555_5555_5555_5555)  # the lower of each two
_MAX_CLOCK = (1 << 32) - 1


def digests_of(raw: bytes) -> Digests:
    """Digests side by side, as two numbers each. The first names a block in its set, so 0, "free", is spared."""
    digests = np.frombuffer(raw, dtype="<u8").reshape(-1, DIGEST_BYTES // 8).astype(_U64)
    digests[digests[:, 0] == 0, 0] = 1
    return digests


class HolderTable:
    """Holders are numbers from 0 on; the table widens for the largest. Codes: 0 nothing, 1 device, 2 memory, 3 disk."""

    def __init__(self, num_places: int) -> None:
        num_sets = max(1, num_places // WAYS)
        num_sets = 1 << (num_sets.bit_length() - 1)
        self.num_places = num_sets * WAYS
        self._names = np.zeros(self.num_places, _U64)
        self._last_use = np.zeros(self.num_places, np.uint32)
        self._planes: list[Digests] = []
        self._set_mask = _U64(num_sets - 1)
        self._turn_of_set = np.zeros(num_sets, np.int64)  # scratch of `_first_of_each_set`
        self._clock = 1
        self.num_blocks = 0  # places in use, those that nobody holds any more included

    @property
    def num_bytes(self) -> int:
        planes = sum(plane.nbytes for plane in self._planes)
        return planes + self._names.nbytes + self._last_use.nbytes + self._turn_of_set.nbytes

    def store(self, holder: int, digests: Digests, codes: Codes) -> None:
        """The holder has these blocks from now on; those that had to go for them are gone for all holders."""
        self._tick()
        while not self._has(holder):
            self._planes.append(np.zeros(self.num_places, _U64))
        places = self._find(digests)
        is_known = places >= 0
        self._write(holder, places[is_known], codes[is_known])
        rest = np.flatnonzero(~is_known)
        while len(rest):
            turn = self._first_of_each_set(digests[rest, 1])
            now, rest = rest[turn], rest[~turn]
            self._insert(holder, digests[now], codes[now])

    def remove(self, holder: int, digests: Digests) -> None:
        if self._has(holder):
            places = self._find(digests)
            places = places[places >= 0]
            self._write(holder, places, np.zeros(len(places), _U64))

    def clear(self, holder: int) -> None:
        """The holder has nothing; reads the whole table, which is seldom: a worker left, or tells all it has."""
        if self._has(holder):
            plane, number = divmod(holder, HOLDERS_PER_PLANE)
            self._planes[plane] &= ~_U64(3 << 2 * number)

    def leading(self, digests: Digests) -> dict[int, list[int]]:
        """Of every holder of the first block: how many blocks it has from there on without a hole, by code.

        Counts as use of all of them.
        """
        self._tick()
        if not self._planes:
            return {}
        found: dict[int, list[int]] = {}
        alive = [_HELD_BITS] * len(self._planes)
        for start, stop in _portions(len(digests)):
            places = self._find_leading(digests[start:stop])
            if not len(places):
                break
            self._last_use[places] = self._clock
            for number, plane in enumerate(self._planes):
                held = plane[places]
                chain = np.bitwise_and.accumulate((held | (held >> _U64(1))) & alive[number])
                self._count_chains(found, number * HOLDERS_PER_PLANE, held, chain)
                alive[number] = chain[-1]
            if len(places) < stop - start or not any(alive):
                break
        return found

    def check(self) -> None:
        """Raises AssertionError where a block is in a set twice or held without a name."""
        names = self._names.reshape(-1, WAYS)
        ordered = np.sort(names, axis=1)
        assert not np.any((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != 0)), (
            "a block is there twice"
        )
        for plane in self._planes:
            assert not np.any(plane[self._names == 0]), "somebody holds a block without a name"
        num_named = np.count_nonzero(self._names)
        assert num_named == self.num_blocks, f"{self.num_blocks} blocks counted, {num_named} are there"
        assert not np.any(self._last_use > self._clock), "a block was of use in the future"

    def _count_chains(
        self, found: dict[int, list[int]], first_holder: int, held: Digests, chain: Digests
    ) -> None:
        for bit in _bits(int(chain[0])):
            length = int(np.count_nonzero(chain & _U64(1 << bit)))
            codes = (held[:length] >> _U64(bit)) & _U64(3)
            counts = np.bincount(codes.astype(np.int64), minlength=4).tolist()
            holder = first_holder + bit // 2
            found[holder] = [
                old + new for old, new in zip(found.get(holder, (0, 0, 0, 0)), counts, strict=True)
            ]

    def _find(self, digests: Digests) -> Places:
        """The place of each, -1 where there is none."""
        first = (digests[:, 1] & self._set_mask).astype(np.int64) * WAYS
        ways = self._names[first[:, None] + np.arange(WAYS)] == digests[:, :1]
        return np.where(ways.any(axis=1), first + ways.argmax(axis=1), -1)

    def _find_leading(self, digests: Digests) -> Places:
        places = self._find(digests)
        missing = places < 0
        return places[: int(missing.argmax())] if missing.any() else places

    def _first_of_each_set(self, halves: Digests) -> npt.NDArray[np.bool_]:
        """Two new blocks of one set must not take the same place: they are inserted one after the other."""
        sets = (halves & self._set_mask).astype(np.int64)
        numbers = np.arange(len(sets))
        self._turn_of_set[sets[::-1]] = numbers[::-1]
        is_first: npt.NDArray[np.bool_] = self._turn_of_set[sets] == numbers
        return is_first

    def _insert(self, holder: int, digests: Digests, codes: Codes) -> None:
        """Of one set at most one; a block that came twice in one batch is there already the second time."""
        places = self._find(digests)
        is_new = places < 0
        victims = self._least_useful(digests[is_new, 1])
        self.num_blocks += int(np.count_nonzero(self._names[victims] == 0))
        self._names[victims] = digests[is_new, 0]
        for plane in self._planes:
            plane[victims] = 0
        places[is_new] = victims
        self._write(holder, places, codes)

    def _least_useful(self, halves: Digests) -> Places:
        first = (halves & self._set_mask).astype(np.int64) * WAYS
        places = first[:, None] + np.arange(WAYS)
        is_held = np.zeros(places.shape, np.bool_)
        in_device = np.zeros(places.shape, np.bool_)
        for plane in self._planes:
            held = plane[places]
            is_held |= held != 0
            in_device |= (held & ~(held >> _U64(1)) & _HELD_BITS) != 0  # code 1: the lower bit alone
        use = self._last_use[places].astype(np.int64) * 2 + in_device
        worst: Places = first + np.where(is_held, use, -1).argmin(axis=1)
        return worst

    def _write(self, holder: int, places: Places, codes: Codes) -> None:
        plane, number = divmod(holder, HOLDERS_PER_PLANE)
        shift = _U64(2 * number)
        words = self._planes[plane]
        words[places] = (words[places] & ~(_U64(3) << shift)) | (codes << shift)
        self._last_use[places] = self._clock

    def _has(self, holder: int) -> bool:
        return holder < len(self._planes) * HOLDERS_PER_PLANE

    def _tick(self) -> None:
        if self._clock == _MAX_CLOCK:
            self._last_use //= 2
            self._clock //= 2
        self._clock += 1


def _portions(num_blocks: int) -> Iterator[tuple[int, int]]:
    start, size = 0, FIRST_LOOKUP_BLOCKS
    while start < num_blocks:
        yield start, min(start + size, num_blocks)
        start, size = start + size, LOOKUP_BLOCKS


def _bits(word: int) -> Iterator[int]:
    while word:
        lowest = word & -word
        yield lowest.bit_length() - 1
        word ^= lowest
