"""Protobuf messages of workers to our types and back, checked where they come in."""

from control_plane.directory.block_events import BlockEvents
from control_plane.directory.member import Incarnation, Member, Model, Role, WorkerId, WorkerLoad
from control_plane.directory.memory import Change, ChangeKind
from kvstore.layout import KvLayout
from protos import directory_pb2, worker_pb2

_ROLES = {
    worker_pb2.ROLE_PREFILL: Role.PREFILL,
    worker_pb2.ROLE_DECODE: Role.DECODE,
    worker_pb2.ROLE_MIXED: Role.MIXED,
    worker_pb2.ROLE_STORE: Role.STORE,
}
_ROLES_ON_WIRE = {role: number for number, role in _ROLES.items()}
_KINDS_ON_WIRE = {
    ChangeKind.JOINED: directory_pb2.WatchEvent.JOINED,
    ChangeKind.UPDATED: directory_pb2.WatchEvent.UPDATED,
    ChangeKind.LEFT: directory_pb2.WatchEvent.LEFT,
}


def read_member(message: worker_pb2.WorkerDescription) -> Member:
    """Raises ValueError with the offending value."""
    if message.role not in _ROLES:
        raise ValueError(
            f"role of {message.worker_id!r} must be prefill, decode, mixed or store, got {message.role}"
        )
    return Member(
        worker_id=WorkerId(message.worker_id),
        epoch=message.epoch,
        role=_ROLES[message.role],
        control_address=message.control_address,
        data_address=message.data_address,
        model=_read_model(message.model),
        load=read_load(message.load),
        pid=message.pid,
        block_format=message.block_format,
        is_draining=message.is_draining,
        max_num_seqs=message.max_num_seqs or None,
    )


def _read_model(message: worker_pb2.ModelDescription) -> Model:
    return Model(
        name=message.name,
        fingerprint=message.fingerprint,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        layout=KvLayout(
            num_layers=message.layout.num_layers,
            num_kv_heads=message.layout.num_kv_heads,
            head_dim=message.layout.head_dim,
            dtype=message.layout.dtype,
            block_size_tokens=message.layout.block_size_tokens,
        ),
    )


def read_load(message: worker_pb2.WorkerLoad) -> WorkerLoad:
    return WorkerLoad(
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        num_pages=message.num_pages,
        num_free_pages=message.num_free_pages,
        num_waiting_tokens=message.num_waiting_tokens,
        num_leases=message.num_leases,
        num_demanded_pages=message.num_demanded_pages,
    )


def read_incarnation(
    message: directory_pb2.HeartbeatRequest | directory_pb2.DeregisterRequest,
) -> Incarnation:
    return Incarnation(WorkerId(message.worker_id), message.epoch)


def read_blocks(message: directory_pb2.HeartbeatRequest) -> BlockEvents | None:
    """None: the heartbeat says nothing about blocks. Raises ValueError with the offending value."""
    if not message.HasField("blocks"):
        return None
    blocks = message.blocks
    return BlockEvents(
        sequence=blocks.sequence,
        snapshot=blocks.snapshot,
        stored=blocks.stored,
        stored_tiers=blocks.stored_tiers,
        removed=blocks.removed,
    )


def write_heartbeat(
    incarnation: Incarnation, *, load: WorkerLoad, blocks: BlockEvents | None
) -> directory_pb2.HeartbeatRequest:
    message = directory_pb2.HeartbeatRequest(
        worker_id=incarnation.worker_id, epoch=incarnation.epoch, load=_write_load(load)
    )
    if blocks is not None:
        message.blocks.sequence = blocks.sequence
        message.blocks.snapshot = blocks.snapshot
        message.blocks.stored = blocks.stored
        message.blocks.stored_tiers = blocks.stored_tiers
        message.blocks.removed = blocks.removed
    return message


def write_store(member: Member) -> directory_pb2.StoreMember:
    return directory_pb2.StoreMember(
        worker_id=member.worker_id, epoch=member.epoch, control_address=member.control_address
    )


def write_change(change: Change) -> directory_pb2.WatchEvent:
    return directory_pb2.WatchEvent(kind=_KINDS_ON_WIRE[change.kind], worker=write_member(change.member))


def write_member(member: Member) -> worker_pb2.WorkerDescription:
    model, layout = member.model, member.model.layout
    return worker_pb2.WorkerDescription(
        worker_id=member.worker_id,
        epoch=member.epoch,
        role=_ROLES_ON_WIRE[member.role],
        control_address=member.control_address,
        data_address=member.data_address,
        model=worker_pb2.ModelDescription(
            name=model.name,
            fingerprint=model.fingerprint,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            layout=worker_pb2.KvLayout(
                num_layers=layout.num_layers,
                num_kv_heads=layout.num_kv_heads,
                head_dim=layout.head_dim,
                block_size_tokens=layout.block_size_tokens,
                dtype=layout.dtype,
            ),
        ),
        load=_write_load(member.load),
        pid=member.pid,
        block_format=member.block_format,
        is_draining=member.is_draining,
        max_num_seqs=member.max_num_seqs or 0,
    )


def _write_load(load: WorkerLoad) -> worker_pb2.WorkerLoad:
    return worker_pb2.WorkerLoad(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_pages=load.num_pages,
        num_free_pages=load.num_free_pages,
        num_waiting_tokens=load.num_waiting_tokens,
        num_leases=load.num_leases,
        num_demanded_pages=load.num_demanded_pages,
    )
