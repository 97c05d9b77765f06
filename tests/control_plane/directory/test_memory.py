from dataclasses import replace

import pytest

from control_plane.directory import memory
from control_plane.directory.block_events import BlockEvents
from control_plane.directory.errors import StaleEpoch, UnknownWorker
from control_plane.directory.member import Incarnation, Member, Model, Role, WorkerId, WorkerLoad
from control_plane.directory.memory import Change, ChangeKind, MemoryDirectory
from kvstore.blocks import BlockKey
from kvstore.layout import KvLayout

MODEL = Model(
    name="m",
    fingerprint=b"f",
    max_model_len=128,
    vocab_size=100,
    layout=KvLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32"),
)
KEY = BlockKey(bytes(16))


def member(worker_id: str = "w", *, epoch: int = 1) -> Member:
    return Member(
        worker_id=WorkerId(worker_id),
        epoch=epoch,
        role=Role.DECODE,
        control_address="127.0.0.1:1",
        data_address="tcp://127.0.0.1:2",
        model=MODEL,
    )


class Scene:
    def __init__(self) -> None:
        self.directory = MemoryDirectory(ttl_s=2.0, max_blocks=32)
        self.changes: list[Change] = []
        self.directory.subscribe(self.changes.append)

    def kinds(self) -> list[tuple[str, str, int]]:
        return [(c.kind.value, str(c.member.worker_id), c.member.epoch) for c in self.changes]

    def beat(
        self, of: Member, *, now_s: float, load: WorkerLoad | None = None, blocks: BlockEvents | None = None
    ) -> bool:
        return self.directory.heartbeat(of.incarnation, load=load or WorkerLoad(), blocks=blocks, now_s=now_s)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_registered_worker_is_a_member_at_once(scene: Scene) -> None:
    scene.directory.register(member(), now_s=0.0)
    assert scene.directory.members() == (member(),)
    assert scene.kinds() == [("joined", "w", 1)]
    scene.directory.check()


def test_a_silent_worker_leaves_when_its_time_is_up_and_not_before(scene: Scene) -> None:
    scene.directory.register(member("silent"), now_s=0.0)
    scene.directory.register(member("alive"), now_s=0.0)
    scene.beat(member("alive"), now_s=1.5)
    assert scene.directory.expire(now_s=1.9) == ()
    assert scene.directory.expire(now_s=2.0) == (member("silent"),)
    assert [m.worker_id for m in scene.directory.members()] == ["alive"]
    assert scene.kinds()[-1] == ("left", "silent", 1)
    scene.directory.check()


def test_a_heartbeat_updates_the_load(scene: Scene) -> None:
    scene.directory.register(member(), now_s=0.0)
    load = WorkerLoad(num_running=3, num_pages=10)
    assert scene.beat(member(), now_s=0.5, load=load) is False
    assert scene.directory.members() == (replace(member(), load=load),)
    assert scene.kinds()[-1] == ("updated", "w", 1)


def test_a_heartbeat_of_nobody_is_told_to_register(scene: Scene) -> None:
    with pytest.raises(UnknownWorker, match="w \\(epoch 1\\) is not registered"):
        scene.beat(member(), now_s=0.0)


def test_a_new_epoch_takes_the_place_of_the_old_one(scene: Scene) -> None:
    scene.directory.register(member(epoch=9), now_s=0.0)
    scene.beat(member(epoch=9), now_s=0.0, blocks=BlockEvents(sequence=1, stored=KEY))
    scene.directory.register(member(epoch=4), now_s=0.1)
    assert scene.kinds()[-2:] == [("left", "w", 9), ("joined", "w", 4)]
    assert scene.directory.blocks.overlaps((KEY,)) == {}
    scene.directory.check()


def test_messages_of_a_replaced_epoch_are_refused(scene: Scene) -> None:
    scene.directory.register(member(epoch=9), now_s=0.0)
    scene.directory.register(member(epoch=4), now_s=0.1)
    with pytest.raises(StaleEpoch, match=r"epoch 9.*epoch 4"):
        scene.beat(member(epoch=9), now_s=0.2)
    with pytest.raises(StaleEpoch, match=r"epoch 9.*replaced by epoch 4"):
        scene.directory.register(member(epoch=9), now_s=0.2)
    with pytest.raises(StaleEpoch):
        scene.directory.deregister(Incarnation(WorkerId("w"), 9))
    assert [m.epoch for m in scene.directory.members()] == [4]


def test_an_epoch_replaced_while_it_was_expired_stays_refused(scene: Scene) -> None:
    scene.directory.register(member(epoch=9), now_s=0.0)
    scene.directory.expire(now_s=5.0)
    scene.directory.register(member(epoch=4), now_s=5.0)
    with pytest.raises(StaleEpoch):
        scene.directory.register(member(epoch=9), now_s=5.1)


def test_a_worker_that_was_only_frozen_may_come_back(scene: Scene) -> None:
    scene.directory.register(member(), now_s=0.0)
    scene.directory.expire(now_s=5.0)
    scene.directory.register(member(), now_s=6.0)
    assert scene.kinds() == [("joined", "w", 1), ("left", "w", 1), ("joined", "w", 1)]


def test_registering_again_is_no_second_join_and_keeps_the_blocks(scene: Scene) -> None:
    scene.directory.register(member(), now_s=0.0)
    scene.beat(member(), now_s=0.0, blocks=BlockEvents(sequence=1, stored=KEY))
    scene.directory.register(member(), now_s=1.0)
    assert scene.kinds()[-1][0] == "updated"
    assert WorkerId("w") in scene.directory.blocks.overlaps((KEY,))


def test_deregistering_twice_is_no_error(scene: Scene) -> None:
    scene.directory.register(member(), now_s=0.0)
    scene.directory.deregister(member().incarnation)
    scene.directory.deregister(member().incarnation)
    assert scene.directory.members() == ()
    assert scene.kinds()[-1] == ("left", "w", 1)


def test_a_gap_in_the_block_events_asks_for_them_again(scene: Scene) -> None:
    scene.directory.register(member(), now_s=0.0)
    assert scene.beat(member(), now_s=0.0, blocks=BlockEvents(sequence=5, stored=KEY)) is True
    snapshot = BlockEvents(sequence=6, snapshot=True, stored=KEY)
    assert scene.beat(member(), now_s=0.1, blocks=snapshot) is False


def test_a_listener_sees_the_change_it_is_told_of_and_can_end(scene: Scene) -> None:
    seen: list[tuple[ChangeKind, int]] = []
    end = scene.directory.subscribe(lambda change: seen.append((change.kind, len(scene.directory.members()))))
    scene.directory.register(member(), now_s=0.0)
    scene.directory.deregister(member().incarnation)
    end()
    scene.directory.register(member(), now_s=0.0)
    assert seen == [(ChangeKind.JOINED, 1), (ChangeKind.LEFT, 0)]


def test_what_is_remembered_of_former_workers_is_bounded(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MAX_REMEMBERED_WORKERS", 5)
    scene.directory.register(member("keeps"), now_s=0.0)
    for number in range(50):
        once = member(f"w{number}")
        scene.directory.register(once, now_s=0.0)
        scene.directory.deregister(once.incarnation)
        scene.directory.check()
    for epoch in range(1, 50):
        scene.directory.register(member("keeps", epoch=epoch), now_s=0.0)
    scene.directory.check()


@pytest.mark.parametrize(("field", "value"), [("worker_id", ""), ("epoch", 0), ("control_address", "")])
def test_a_member_that_nobody_could_reach_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        replace(member(), **{field: value})


def test_after_a_stall_of_the_directory_a_living_worker_has_time_to_be_heard(scene: Scene) -> None:
    scene.directory.register(member(), now_s=0.0)
    for stalled_until_s in (10.0, 20.0):  # heard in between, so the second time counts as well
        scene.directory.postpone_expiry(until_s=stalled_until_s + 0.5)
        assert scene.directory.expire(now_s=stalled_until_s) == ()
        scene.beat(member(), now_s=stalled_until_s + 0.1)
        assert scene.directory.expire(now_s=stalled_until_s + 2.0) == ()
    scene.directory.check()


def test_a_dead_worker_leaves_however_often_the_directory_is_held_up(scene: Scene) -> None:
    scene.directory.register(member(), now_s=0.0)
    scene.directory.postpone_expiry(until_s=1.9)  # changes nothing: it has until 2.0 anyway
    scene.directory.postpone_expiry(until_s=2.75)
    scene.directory.postpone_expiry(until_s=3.5)
    assert scene.directory.expire(now_s=2.7) == ()
    assert scene.directory.expire(now_s=2.75) == (member(),)
    scene.directory.check()


def test_a_worker_that_comes_back_is_spared_anew(scene: Scene) -> None:
    scene.directory.register(member(), now_s=0.0)
    scene.directory.postpone_expiry(until_s=2.5)
    scene.directory.deregister(member().incarnation)
    scene.directory.check()
    scene.directory.register(member(), now_s=3.0)
    scene.directory.postpone_expiry(until_s=5.5)
    assert scene.directory.expire(now_s=5.25) == ()
