"""What the KV store's messages say, checked: runs of digests, tiers, descriptions. With `wire` and `handoff_wire` all
that knows protobuf and our types.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from kvstore.blocks import DIGEST_BYTES, BlockKey
from kvstore.store import StoreDescription
from kvstore.tiers.tier import BlockRun, Tier, TierStats
from protos import kv_pb2, worker_pb2
from workers.errors import InvalidRequest
from workers.fetch import MAX_KEYS_PER_PULL
from workers.kv_metrics import LevelTraffic
from workers.request import KvHolder

MAX_RUNS_PER_OFFER = 256
MAX_PREFIXES = 1000
MAX_CHAIN_BLOCKS = 2**31


def keys_from_wire(data: bytes) -> tuple[BlockKey, ...]:
    """Raises InvalidRequest unless these are 1 to MAX_KEYS_PER_PULL digests, none of them twice."""
    num_keys, rest = divmod(len(data), DIGEST_BYTES)
    if rest or not 1 <= num_keys <= MAX_KEYS_PER_PULL:
        raise InvalidRequest(
            f"block_keys must be 1 to {MAX_KEYS_PER_PULL} digests of {DIGEST_BYTES} bytes, got {len(data)} bytes"
        )
    # Slicing each of them took more than twice as long, on the event loop.
    keys: tuple[BlockKey, ...] = tuple(np.frombuffer(data, f"V{DIGEST_BYTES}").tolist())
    if len(set(keys)) < num_keys:
        raise InvalidRequest(f"block_keys must be {num_keys} different digests, got {len(set(keys))}")
    return keys


def key_from_wire(data: bytes, *, name: str) -> BlockKey:
    if len(data) != DIGEST_BYTES:
        raise InvalidRequest(f"{name} must be a digest of {DIGEST_BYTES} bytes, got {len(data)}")
    return BlockKey(data)


def runs_from_wire(messages: Sequence[kv_pb2.OfferedRun]) -> tuple[BlockRun, ...]:
    """Raises InvalidRequest."""
    if len(messages) > MAX_RUNS_PER_OFFER:
        raise InvalidRequest(f"an offer has at most {MAX_RUNS_PER_OFFER} runs, got {len(messages)}")
    num_bytes = sum(len(message.block_keys) for message in messages)
    if num_bytes > MAX_KEYS_PER_PULL * DIGEST_BYTES:
        raise InvalidRequest(
            f"an offer has at most {MAX_KEYS_PER_PULL} blocks, got {num_bytes} bytes of digests"
        )
    return tuple(map(_run_from_wire, messages))


def _run_from_wire(message: kv_pb2.OfferedRun) -> BlockRun:
    root, parent = key_from_wire(message.root, name="root"), key_from_wire(message.parent, name="parent")
    if (message.first_position == 0) != (root == parent):
        raise InvalidRequest(
            f"the parent of block {message.first_position} must {'' if root != parent else 'not '}be the root"
        )
    keys = keys_from_wire(message.block_keys)
    if parent in keys:
        raise InvalidRequest(f"block {parent.hex()} cannot continue itself")
    if message.first_position + len(keys) > MAX_CHAIN_BLOCKS:
        raise InvalidRequest(
            f"a chain has at most {MAX_CHAIN_BLOCKS} blocks, got {len(keys)} from {message.first_position} on"
        )
    return BlockRun(root=root, parent=parent, first_position=message.first_position, keys=keys)


def runs_to_wire(runs: Iterable[BlockRun]) -> list[kv_pb2.OfferedRun]:
    return [
        kv_pb2.OfferedRun(
            root=run.root,
            parent=run.parent,
            first_position=run.first_position,
            block_keys=b"".join(run.keys),
        )
        for run in runs
    ]


def holder_from_wire(message: worker_pb2.KvHolder) -> KvHolder:
    """Raises InvalidRequest."""
    if not message.control_address:
        raise InvalidRequest(f"holder {message.worker_id!r} needs a control_address")
    return KvHolder(
        worker_id=message.worker_id,
        epoch=message.epoch,
        control_address=message.control_address,
        num_blocks=message.num_blocks,
    )


def holder_to_wire(holder: KvHolder) -> worker_pb2.KvHolder:
    return worker_pb2.KvHolder(
        worker_id=holder.worker_id,
        epoch=holder.epoch,
        control_address=holder.control_address,
        num_blocks=holder.num_blocks,
    )


def description_to_wire(
    store: StoreDescription,
    *,
    more_tiers: Mapping[Tier, TierStats],
    num_lookup_blocks: int,
    levels: Mapping[str, LevelTraffic],
) -> kv_pb2.TiersDescription:
    """`more_tiers` are those beside the store's; of one that is in both, it says what counts."""
    tiers = {**store.tiers, **more_tiers}
    return kv_pb2.TiersDescription(
        tiers=[_tier_to_wire(tier, tiers[tier]) for tier in sorted(tiers)],
        prefixes=[
            kv_pb2.PrefixDescription(
                root=prefix.root,
                last_key=prefix.last_key,
                num_blocks=prefix.num_blocks,
                age_s=prefix.age_s,
                idle_s=prefix.idle_s,
                num_hits=prefix.num_hits,
                tier=tier.name.lower(),
            )
            for tier, prefix in store.prefixes
        ],
        levels=[
            kv_pb2.LevelDescription(name=name, raw_bytes=level.raw_bytes, coded_bytes=level.coded_bytes)
            for name, level in levels.items()
        ],
        num_lookup_blocks=num_lookup_blocks,
    )


def _tier_to_wire(tier: Tier, stats: TierStats) -> kv_pb2.TierDescription:
    return kv_pb2.TierDescription(
        name=tier.name.lower(),
        num_blocks=stats.num_blocks,
        capacity_blocks=stats.capacity_blocks,
        used_bytes=stats.used_bytes,
        capacity_bytes=stats.capacity_bytes,
        num_hit_blocks=stats.num_hit_blocks,
        num_stored_blocks=stats.num_stored_blocks,
        num_evicted_blocks=stats.num_evicted_blocks,
        num_errors=stats.num_errors,
    )
