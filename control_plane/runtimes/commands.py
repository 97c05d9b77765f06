"""Command lines and environments of the cluster's processes: what `ClusterConfig` means to each."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from control_plane.config import PROJECT_ROOT, ClusterConfig
from control_plane.config_workers import PoolConfig

# -P: a directory "workers" where the user happens to stand must not be taken for ours.
_PYTHON = (sys.executable, "-P", "-m")
_WORKER_SETTINGS = (
    "device",
    "attention",
    "kv_cache_bytes",
    "num_pages",
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_num_waiting",
    "scheduling_policy",
    "lease_s",
    "pull_timeout_s",
    "drain_timeout_s",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerPlace:
    """Where one worker runs: its pool, its number there from 0 on, its name in the cluster and its cores."""

    pool: str
    replica: int
    name: str
    cores: tuple[int, ...]


def control_command(config_path: Path, replica: int) -> list[str]:
    command = [*_PYTHON, "control_plane.gateway", "--config", str(config_path)]
    return [*command, "--replica", str(replica)]


def worker_command(config: ClusterConfig, place: WorkerPlace) -> list[str]:
    pool = pool_config(config, place.pool)
    settings: dict[str, object] = {
        "role": place.pool,
        "worker_id": place.name,
        "model_path": config.model.path,
        "model_name": config.model.name,
        "dtype": config.model.dtype,
        "quantize": config.model.quantize,
        "kv_dtype": config.model.kv_dtype,
        "max_model_len": config.model.max_model_len,
        "num_threads": num_threads(pool, place.cores),
        "directory": ",".join(config.directory_addresses),
        "log_level": config.log_level,
        **{name: getattr(pool, name) for name in _WORKER_SETTINGS},
        **_tier_settings(config, place),
    }
    if pool.metrics_port is not None:
        settings["metrics_port"] = pool.metrics_port + place.replica
    if config.transport == "unix":
        settings["control_address"] = f"unix:{config.socket_dir / place.name}.control.sock"
        settings["data_address"] = f"unix://{config.socket_dir / place.name}.data.sock"
    flags = (
        (f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items() if value is not None
    )
    return [*_PYTHON, "workers", *(word for flag in flags for word in flag)]


def _tier_settings(config: ClusterConfig, place: WorkerPlace) -> dict[str, object]:
    pool = pool_config(config, place.pool)
    settings: dict[str, object] = {
        "memory_tier_bytes": config.kv.memory_bytes(pool),
        "tier_policy": config.kv.tier_policy,
        "max_level": config.kv.max_level,
        "ttft_objective_s": config.kv.ttft_objective_s,
    }
    if (disk_bytes := config.kv.disk_bytes(pool)) > 0:
        settings["disk_tier_path"] = disk_dir(config, place.name)
        settings["disk_tier_bytes"] = disk_bytes
        settings["disk_tier_key"] = config.kv.disk_key or None
    return settings


def disk_dir(config: ClusterConfig, worker_name: str) -> Path:
    """Of one worker's disk tier: found again by the worker of that name, also after a restart of the cluster."""
    return config.kv_dir / worker_name


def pool_config(config: ClusterConfig, pool: str) -> PoolConfig:
    pools = config.pools.by_name()
    if pool not in pools:
        raise ValueError(f"pool is {pool!r}, but it must be one of: {', '.join(pools)}")
    return pools[pool]


def num_threads(pool: PoolConfig, cores: tuple[int, ...]) -> int:
    return pool.num_threads or len(cores) or 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Commands:
    """How to start each kind of process."""

    control: Callable[[Path, int], list[str]] = control_command
    worker: Callable[[ClusterConfig, WorkerPlace], list[str]] = worker_command


def environment(num_compute_threads: int) -> Mapping[str, str]:
    """What a process inherits. Numeric libraries read these before anyone could tell them otherwise."""
    threads = str(num_compute_threads)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    python_path = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **dict.fromkeys(names, threads), "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}
