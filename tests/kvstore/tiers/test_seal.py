from pathlib import Path

import pytest

from kvstore.blocks import BlockKey
from kvstore.errors import DiskFailed
from kvstore.tiers.seal import SEAL_BYTES, BlockSeal, resolve_key

KEY = bytes(range(32))
BLOCK = b"sixteen tokens of keys and values"
NAME = BlockKey(b"k" * 16)


def make_seal(*, key: bytes = KEY, salt: bytes = b"salt" * 4, namespace: bytes = b"model") -> BlockSeal:
    return BlockSeal(key, salt=salt, namespace=namespace)


def sealed(seal: BlockSeal) -> bytearray:
    into = bytearray(len(BLOCK) + SEAL_BYTES)
    seal.seal(memoryview(BLOCK), key=NAME, position=3, into=memoryview(into))
    return into


def opened(seal: BlockSeal, data: bytes, *, key: BlockKey = NAME, position: int = 3) -> bytes:
    into = bytearray(len(BLOCK))
    seal.open(memoryview(data), key=key, position=position, into=memoryview(into))
    return bytes(into)


def test_a_block_comes_back_and_is_unreadable_meanwhile() -> None:
    seal = make_seal()
    data = sealed(seal)
    assert BLOCK not in data
    assert opened(seal, data) == BLOCK


def test_no_two_seals_of_a_block_are_equal() -> None:
    assert sealed(make_seal()) != sealed(make_seal())


@pytest.mark.parametrize("at", [0, 12, 20, -1])
def test_a_changed_byte_is_noticed(at: int) -> None:
    data = sealed(make_seal())
    data[at] ^= 1
    with pytest.raises(DiskFailed, match="does not open"):
        opened(make_seal(), data)


@pytest.mark.parametrize(
    "other",
    [{"key": bytes(32)}, {"salt": bytes(16)}, {"namespace": b"another"}],
    ids=lambda other: next(iter(other)),
)
def test_only_the_same_key_segment_and_namespace_open_a_block(other: dict[str, bytes]) -> None:
    with pytest.raises(DiskFailed):
        opened(make_seal(**other), sealed(make_seal()))


def test_a_block_does_not_open_as_another() -> None:
    seal = make_seal()
    with pytest.raises(DiskFailed):
        opened(seal, sealed(seal), key=BlockKey(b"l" * 16))
    with pytest.raises(DiskFailed):
        opened(seal, sealed(seal), position=4)


def test_a_key_check_tells_keys_apart() -> None:
    check = make_seal().key_check()
    assert make_seal().is_key_of(check)
    assert not make_seal(key=bytes(32)).is_key_of(check)


def test_a_key_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes, got 16"):
        make_seal(key=bytes(16))


def test_keys_come_from_the_environment_and_from_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PENSTOCK_DISK_KEY", KEY.hex())
    assert resolve_key("env:PENSTOCK_DISK_KEY") == KEY
    path = tmp_path / "key"
    path.write_text(KEY.hex().upper() + "\n")
    assert resolve_key(f"file:{path}") == KEY


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("", "env:NAME or file:PATH"),
        ("env:", "env:NAME or file:PATH"),
        (KEY.hex(), "env:NAME or file:PATH"),
        (f"env:{KEY.hex()}", "env:NAME or file:PATH"),
        ("vault:secret", "env:NAME or file:PATH"),
        ("env:NOT_SET_ANYWHERE", "no variable NOT_SET_ANYWHERE"),
        ("file:/no/such/file", "cannot read the key of the disk tier from /no/such/file"),
        ("file:/dev/null", "must hold 32 bytes in hex"),
    ],
)
def test_what_refers_to_no_key_is_explained(reference: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        resolve_key(reference)


def test_what_is_no_key_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_DISK_KEY", "hunter2")
    for reference in ("env:PENSTOCK_DISK_KEY", "hunter2"):
        with pytest.raises(ValueError, match=r"key of a disk tier|64 digits") as raised:
            resolve_key(reference)
        assert "hunter2" not in str(raised.value)
