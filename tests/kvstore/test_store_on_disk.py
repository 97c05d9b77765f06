"""The store over a real disk tier: what survives a restart, and what never comes back."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from kvstore.blocks import chain_keys, root_key
from kvstore.holdings import Holdings
from kvstore.store import BlockStore
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_settings import DiskSettings
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.tier import BlockRun, Tier

pytestmark = pytest.mark.usefixtures("nothing_is_left")

BLOCK_BYTES = 4096
NUM_SLOTS = 16


def chain(num_blocks: int, *, number: int = 0, salt: str = "") -> BlockRun:
    root = root_key(model_fingerprint=b"model", cache_salt=salt)
    token_ids = [number * 1000 + block for block in range(num_blocks) for _ in range(16)]
    return BlockRun(root=root, parent=root, first_position=0, keys=tuple(chain_keys(root, token_ids)))


def keep(store: BlockStore, run: BlockRun) -> None:
    reservation = store.reserve(len(run.keys))
    assert reservation is not None
    with reservation:
        for slot, key in zip(reservation.slots, run.keys, strict=True):
            store.arena_SX[slot] = np.frombuffer(key * (BLOCK_BYTES // len(key)), np.uint8)
        reservation.commit(run, slots=reservation.slots)


async def found(store: BlockStore, run: BlockRun) -> tuple[Tier, ...]:
    """Where its leading blocks were; each had what was committed under its key."""
    with await store.pin(run.keys) as pinned:
        for slot, key in zip(pinned.slots, run.keys, strict=False):
            assert store.arena_SX[slot].tobytes() == key * (BLOCK_BYTES // len(key))
        return pinned.tiers


@pytest_asyncio.fixture
async def reopen(tmp_path: Path) -> AsyncIterator[Callable[..., BlockStore]]:
    """Opens the store of one directory; every one that was opened is closed in the end."""
    stores: list[BlockStore] = []

    def open_store(**changed: object) -> BlockStore:
        settings = DiskSettings(
            block_bytes=BLOCK_BYTES,
            capacity_bytes=256 * BLOCK_BYTES,
            namespace=b"model",
            **changed,  # type: ignore[arg-type]
        )
        memory = MemoryTier(
            np.zeros(NUM_SLOTS * BLOCK_BYTES, np.uint8),
            block_bytes=BLOCK_BYTES,
            policy="lru",
            holdings=Holdings(),
        )
        store = BlockStore(memory, disk=DiskTier.open(tmp_path, settings=settings))
        stores.append(store)
        return store

    yield open_store
    for store in stores:
        await store.close()
        store.check()


@pytest.mark.parametrize("key", [None, bytes(range(32))], ids=["plain", "encrypted"])
async def test_a_restart_finds_what_was_committed_before(
    reopen: Callable[..., BlockStore], key: bytes | None
) -> None:
    before = reopen(key=key)
    keep(before, chain(10))
    await before.close()

    after = reopen(key=key)

    assert after.holdings.tier(chain(10).keys[9]) is Tier.DISK
    assert await found(after, chain(10)) == (Tier.DISK,) * 10
    assert await found(after, chain(10)) == (Tier.MEMORY,) * 10


async def test_what_memory_gave_away_comes_back_from_disk(reopen: Callable[..., BlockStore]) -> None:
    first = reopen()
    keep(first, chain(8))
    await first.close()
    store = reopen()
    keep(store, chain(16, number=1))
    assert await found(store, chain(8)) == (Tier.DISK,) * 8


async def test_blocks_asked_for_out_of_order_come_back_as_what_they_are(
    reopen: Callable[..., BlockStore],
) -> None:
    """A peer may name what it likes; nothing is believed of blocks but what was written with them."""
    first = reopen()
    ours, theirs = chain(4, salt="A"), chain(4, salt="B")
    keep(first, ours)
    keep(first, theirs)
    await first.close()
    store = reopen()
    odd = ours.keys[1], theirs.keys[2], theirs.keys[0], theirs.keys[2]
    for keys in (ours.keys[::-1], odd, theirs.keys):
        with await store.pin(keys) as pinned:
            assert len(pinned.slots) == len(keys)
        store.check()
    assert await store.drop(ours.root) == 4
    assert store.lookup(ours.keys) == ()
    assert await found(store, theirs) == (Tier.MEMORY,) * 4
    await store.drop(None)
    reservation = store.reserve(NUM_SLOTS)
    assert reservation is not None
    reservation.close()


@pytest.mark.parametrize("salts", [("A", "B"), ("", "A"), ("A", "a")])
async def test_no_tenant_finds_the_blocks_of_another_in_any_tier(
    reopen: Callable[..., BlockStore], salts: tuple[str, str]
) -> None:
    ours, theirs = (chain(6, salt=salt) for salt in salts)
    before = reopen()
    keep(before, ours)
    assert await found(before, theirs) == ()
    await before.close()
    after = reopen()
    assert await found(after, theirs) == ()
    keep(after, theirs)
    assert await after.drop(ours.root) == 6
    assert await found(after, ours) == ()
    assert await found(after, theirs) == (Tier.MEMORY,) * 6


async def test_what_was_dropped_does_not_come_back_with_a_restart(
    reopen: Callable[..., BlockStore], tmp_path: Path
) -> None:
    before = reopen()
    keep(before, chain(6, salt="A"))
    keep(before, chain(6, salt="B"))  # of both, some is being written and some waits
    await before.drop(chain(1, salt="A").root)
    await before.close()
    after = reopen()
    assert await found(after, chain(6, salt="A")) == ()
    assert await found(after, chain(6, salt="B")) == (Tier.DISK,) * 6
    assert not is_in_a_file(tmp_path, chain(1, salt="A").keys[0])
    assert is_in_a_file(tmp_path, chain(1, salt="B").keys[0])


async def test_a_corrupted_block_ends_its_chain_and_is_computed_and_kept_anew(
    reopen: Callable[..., BlockStore], tmp_path: Path
) -> None:
    run = chain(6)
    before = reopen()
    keep(before, run)
    await before.close()
    spoil(tmp_path, run.keys[3])

    store = reopen()

    assert await found(store, run) == (Tier.DISK,) * 3
    assert store.holdings.tier(run.keys[3]) is None
    keep(store, run.part(3, 6))
    assert len(await found(store, run)) == 6


async def test_a_directory_that_vanishes_leaves_memory_to_go_on(
    reopen: Callable[..., BlockStore], tmp_path: Path
) -> None:
    store = reopen()
    keep(store, chain(4))
    remove_files(tmp_path)
    keep(store, chain(4, number=1))
    assert await found(store, chain(4)) == (Tier.MEMORY,) * 4
    assert await found(store, chain(4, number=1)) == (Tier.MEMORY,) * 4


def is_in_a_file(directory: Path, key: bytes) -> bool:
    return any(key * 8 in file.read_bytes() for file in directory.iterdir())


def remove_files(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()


def spoil(directory: Path, key: bytes) -> None:
    """Flips a bit in the middle of the block of `key`."""
    for file in directory.iterdir():
        data = bytearray(file.read_bytes())
        found_at = data.find(key * 8)
        if found_at >= 0:
            data[found_at + BLOCK_BYTES // 2] ^= 1
            file.write_bytes(data)
            return
    raise AssertionError(f"no file has block {key.hex()}")
