"""What `ClusterConfig` decides about workers: the pools, and where KV is kept beside the pages of the engines."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from kvstore.codec.levels import NUM_CACHEGEN_LEVELS

ENGINE_SETTINGS = (
    "device",
    "attention",
    "kv_cache_bytes",
    "num_pages",
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_num_waiting",
    "scheduling_policy",
    "num_threads",
)

_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
MIN_MEMORY_TIER_BYTES = 2**20  # what holds no block is a worker that does not start


def bounded(name: str, value: float | None, *, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name} is {value}, but it must be between {low:g} and {high:g}")


def _bounded_memory_tier(num_bytes: int | None) -> None:
    if num_bytes and not MIN_MEMORY_TIER_BYTES <= num_bytes <= 1 << 50:
        raise ValueError(
            f"memory_tier_bytes is {num_bytes}, but it must be 0, which is no tier, or at least "
            f"{MIN_MEMORY_TIER_BYTES} (1 MiB) and at most {1 << 50}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolConfig:
    """Workers of one role. `None` leaves a setting to the worker's own default."""

    replicas: int = 0
    device: str | None = None  # what computes: cpu, cuda or cuda:N, the same for all of them
    attention: Literal["numba", "triton", "reference"] | None = None  # its kernels; None: those of the device
    kv_cache_bytes: int | None = None  # memory for KV pages
    num_pages: int | None = None  # KV pages of 16 tokens; overrides kv_cache_bytes
    max_num_batched_tokens: int | None = None  # computed in one engine step
    max_num_seqs: int | None = None  # running at the same time
    max_num_waiting: int | None = None  # more are refused as overloaded
    scheduling_policy: Literal["fcfs", "priority", "fair", "deadline"] | None = None  # who goes first
    num_threads: int | None = None  # None: as many as the worker's cores
    lease_s: float | None = None  # how long computed KV is kept without progress of its puller
    pull_timeout_s: float | None = None  # of one pull; past it the prompt is computed again
    drain_timeout_s: float = 30.0  # how long one that stops may take to finish what it has
    memory_tier_bytes: int | None = None  # None: what `kv` says
    disk_tier_bytes: int | None = None  # None: what `kv` says; 0: no disk tier
    metrics_port: int | None = None  # Prometheus, of the first replica; each further one takes the next port

    def __post_init__(self) -> None:
        bounded("replicas", self.replicas, low=0, high=99)
        if self.device is not None and not _DEVICE.fullmatch(self.device):
            raise ValueError(f"device is {self.device!r}, but it must be cpu, cuda or cuda:N")
        if self.attention == "numba" and self.is_on_gpu:
            raise ValueError(f"attention is numba, which computes on a CPU, but device is {self.device}")
        bounded("kv_cache_bytes", self.kv_cache_bytes, low=1 << 16, high=1 << 50)
        bounded("num_pages", self.num_pages, low=2, high=1 << 31)
        bounded("max_num_batched_tokens", self.max_num_batched_tokens, low=1, high=1 << 20)
        bounded("max_num_seqs", self.max_num_seqs, low=1, high=1 << 16)
        bounded("max_num_waiting", self.max_num_waiting, low=1, high=1 << 24)
        bounded("num_threads", self.num_threads, low=1, high=1024)
        bounded("lease_s", self.lease_s, low=0.1, high=3600)
        bounded("pull_timeout_s", self.pull_timeout_s, low=0.1, high=3600)
        bounded("drain_timeout_s", self.drain_timeout_s, low=0.1, high=3600)
        _bounded_memory_tier(self.memory_tier_bytes)
        bounded("disk_tier_bytes", self.disk_tier_bytes, low=0, high=1 << 50)
        bounded("metrics_port", self.metrics_port, low=1, high=65536 - max(1, self.replicas))

    @property
    def is_on_gpu(self) -> bool:
        return self.device not in (None, "cpu")

    @property
    def has_cpu_kernels(self) -> bool:
        """Whether it computes with those that are a CPU's own."""
        return not self.is_on_gpu and self.attention in (None, "numba")

    @property
    def kernels(self) -> str:
        """What says whose kernels compute, as "SETTING is VALUE"."""
        setting = "attention" if self.attention is not None and not self.is_on_gpu else "device"
        return f"{setting} is {getattr(self, setting) or 'cpu'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolsConfig:
    prefill: PoolConfig = field(default_factory=lambda: PoolConfig(replicas=1))
    # No disk for those who decode: prefill workers have written the same prompts already, and on a worker of one core
    # a prompt that is written costs running requests a step or more.
    decode: PoolConfig = field(default_factory=lambda: PoolConfig(replicas=1, disk_tier_bytes=0))
    mixed: PoolConfig = field(default_factory=PoolConfig)
    store: PoolConfig = field(default_factory=PoolConfig)  # keep KV for the others; no engine

    def __post_init__(self) -> None:
        if self.decode.replicas + self.mixed.replicas == 0:
            raise ValueError(
                "decode.replicas and mixed.replicas are both 0, but somebody must generate: set one to 1"
            )
        for name in ENGINE_SETTINGS:
            if getattr(self.store, name) is not None:
                raise ValueError(
                    f"store.{name} is {getattr(self.store, name)}, but a store has no engine: remove it"
                )

    def by_name(self) -> Mapping[str, PoolConfig]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class KvConfig:
    """Where KV is kept beside the engines' pages, for every worker; pools may differ in the sizes."""

    memory_tier_bytes: int = 256 * 2**20  # of one worker; 0: KV is kept nowhere but in the engine's pages
    disk_tier_bytes: int = 512 * 2**20  # of one worker; 0: none
    disk_path: Path | None = None  # a directory for each worker in it; None: `kv` in run_dir
    disk_key: str = ""  # encrypts the disk tier: env:NAME or file:/PATH of 32 bytes in hex
    # Who goes first: least recompute cost per idle time, or least recently used.
    tier_policy: Literal["cost", "lru"] = "cost"
    max_level: int = 1  # the most lossy level KV may travel at: 0 raw, 1 nearly lossless, to 3, the smallest
    ttft_objective_s: float = 0.5  # KV travels at the least lossy level that keeps this

    def __post_init__(self) -> None:
        _bounded_memory_tier(self.memory_tier_bytes)
        bounded("disk_tier_bytes", self.disk_tier_bytes, low=0, high=1 << 50)
        bounded("max_level", self.max_level, low=0, high=NUM_CACHEGEN_LEVELS)
        bounded("ttft_objective_s", self.ttft_objective_s, low=0.001, high=3600)
        if self.disk_key and not self.disk_key.startswith(("env:", "file:/")):
            # Without the value: somebody may have put the key itself there.
            raise ValueError("disk_key is not a reference: it must be env:NAME or file:/PATH")

    def memory_bytes(self, pool: PoolConfig) -> int:
        return self.memory_tier_bytes if pool.memory_tier_bytes is None else pool.memory_tier_bytes

    def disk_bytes(self, pool: PoolConfig) -> int:
        """0 as well where there is no memory tier: blocks reach the disk through it."""
        if self.memory_bytes(pool) == 0:
            return 0
        return self.disk_tier_bytes if pool.disk_tier_bytes is None else pool.disk_tier_bytes
