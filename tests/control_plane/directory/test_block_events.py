import pytest

from control_plane.directory.block_events import BlockEvents
from kvstore.tiers.tier import Tier


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stored": b"odd"}, "stored must hold digests of 16 bytes, got 3 bytes"),
        ({"removed": bytes(17)}, "removed must hold digests of 16 bytes, got 17 bytes"),
        ({"stored": bytes(32), "stored_tiers": b"\0"}, "each of the 2 blocks of stored, or none, got 1"),
        ({"stored_tiers": b"\0"}, "each of the 0 blocks"),
        ({"stored": bytes(16), "stored_tiers": b"\3"}, r"0 \(device\), 1 \(memory\), 2 \(disk\), got 3"),
    ],
)
def test_events_that_make_no_sense_are_refused_with_what_is_wrong(
    fields: dict[str, bytes], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BlockEvents(sequence=1, **fields)


def test_the_parts_of_events_say_the_same_and_the_snapshot_comes_first() -> None:
    stored = b"".join(bytes([number]) * 16 for number in range(5))
    tiers = bytes([Tier.DEVICE, Tier.MEMORY, Tier.DISK, Tier.DEVICE, Tier.DISK])
    whole = BlockEvents(
        sequence=7, snapshot=True, stored=stored, stored_tiers=tiers, removed=b"r" * 16 + b"s" * 16
    )
    parts = list(whole.parts(2))
    assert [part.num_stored for part in parts] == [2, 2, 1]
    assert [part.snapshot for part in parts] == [True, False, False]
    assert {part.sequence for part in parts} == {7}
    for name in ("stored", "stored_tiers", "removed"):
        assert b"".join(getattr(part, name) for part in parts) == getattr(whole, name)


def test_events_without_blocks_are_one_part() -> None:
    assert list(BlockEvents(sequence=3).parts(2)) == [BlockEvents(sequence=3)]
