"""Everything of a worker below its device pages, wired by hand: the store, and what brings blocks in and out of it."""

import asyncio
import hashlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from kvstore.codec.codec import KvCodec
from kvstore.codec.profile import KvProfile, load_profile
from kvstore.errors import ProfileMismatch, TierUnusable
from kvstore.holdings import Holdings
from kvstore.layout import KvLayout
from kvstore.store import BlockStore
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.disk_settings import DiskSettings
from kvstore.tiers.memory import MemoryTier
from kvstore.tiers.seal import resolve_key
from workers.arena import allocate_arena
from workers.block_exports import BlockExportLimits, BlockExports
from workers.config import WorkerConfig
from workers.fetch import BlockFetcher, FetchTimeouts
from workers.kv_metrics import KvMetrics
from workers.logs import log_event
from workers.model.checkpoint import PROFILE_FILE
from workers.model.info import ModelInfo

TELL_EVERY_S = 1.0
# So large a part of the memory tier's bytes is had beside it for chunks that are kept coded.
CODED_SHARE = 16

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiers:
    """The parts that a worker and a store have in common. Their users wire the rest."""

    store: BlockStore
    codec: KvCodec
    exports: BlockExports
    fetcher: BlockFetcher
    metrics: KvMetrics

    async def tell(self) -> None:
        """Keeps the metrics of the tiers fresh, until it is cancelled."""
        while True:
            self.metrics.set_tiers(self.store.describe().tiers)
            await asyncio.sleep(TELL_EVERY_S)

    async def close(self) -> None:
        """When nobody uses them any more. What is in memory is written to disk as far as time allows."""
        await self.fetcher.close()
        self.exports.close()
        await self.store.close()


def open_tiers(
    config: WorkerConfig, model: ModelInfo, *, holdings: Holdings, registry: CollectorRegistry
) -> Tiers:
    """Raises TierUnusable for a disk that cannot be had: who asked for one must not find out by its absence."""
    metrics = KvMetrics(registry, model_name=config.model_name)
    profile = None if model.layout.is_scaled else _profile(config.model_path, model, metrics)
    codec = KvCodec(model.layout, profile=profile)
    store = BlockStore(
        MemoryTier(
            _arena(config, model.layout),
            block_bytes=model.layout.block_bytes,
            policy=config.tier_policy,
            holdings=holdings,
        ),
        disk=None if config.disk_tier_path is None else _disk(config, model, config.disk_tier_path),
    )
    return Tiers(
        store=store,
        codec=codec,
        exports=BlockExports(
            store,
            codec=codec,
            metrics=metrics,
            limits=BlockExportLimits(
                coded_bytes=config.memory_tier_bytes // CODED_SHARE, total_s=config.pull_timeout_s
            ),
        ),
        fetcher=BlockFetcher(
            model_fingerprint=model.fingerprint,
            layout=model.layout,
            profile_id=codec.profile_id,
            timeouts=FetchTimeouts(total_s=config.pull_timeout_s),
        ),
        metrics=metrics,
    )


def _arena(config: WorkerConfig, layout: KvLayout) -> NDArray[np.uint8]:
    if config.memory_tier_bytes < layout.block_bytes:
        raise TierUnusable(
            f"memory_tier_bytes {config.memory_tier_bytes} is less than one block of {layout.block_bytes} bytes"
        )
    return allocate_arena(config.memory_tier_bytes)


def _disk(config: WorkerConfig, model: ModelInfo, directory: Path) -> DiskTier:
    try:
        settings = DiskSettings(
            block_bytes=model.layout.block_bytes,
            capacity_bytes=config.disk_tier_bytes,
            namespace=_namespace(model.fingerprint, model.layout),
            policy=config.tier_policy,
            key=resolve_key(config.disk_tier_key) if config.disk_tier_key else None,
        )
    except ValueError as error:
        raise TierUnusable(str(error)) from error
    _check_fits(directory, num_bytes=config.disk_tier_bytes)
    return DiskTier.open(directory, settings=settings)


def _check_fits(directory: Path, *, num_bytes: int) -> None:
    """More than the whole disk is a slip of the pen, and the index of it would take memory that is not there."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    total_bytes = shutil.disk_usage(existing).total
    if num_bytes > total_bytes:
        raise TierUnusable(
            f"disk_tier_bytes {num_bytes} is more than the {total_bytes} bytes of the disk at {existing}"
        )


def _namespace(fingerprint: bytes, layout: KvLayout) -> bytes:
    return hashlib.sha256(fingerprint + repr(layout).encode()).digest()


def _profile(model_path: Path, model: ModelInfo, metrics: KvMetrics) -> KvProfile | None:
    """None too for a profile of another model: chunks then bring their own tables, which costs bytes and no request."""
    path = model_path / PROFILE_FILE
    try:
        return load_profile(path, fingerprint=model.fingerprint, layout=model.layout)
    except ProfileMismatch as error:
        metrics.mismatch("profile")
        detail = f"{error}; until penstock profile-kv has made one, coded chunks bring their own tables and are larger"
        log_event(_logger, "profile_of_another_model", level=logging.WARNING, path=path, detail=detail)
        return None
