"""All settings of a worker, validated. The command line (`workers.__main__`) and nothing else makes one."""

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, get_type_hints

from kvstore.addresses import parse_address
from kvstore.layout import WHOLE_DTYPES
from workers.compute_device import ComputeDevice
from workers.policies import POLICIES
from workers.quantization import KV_DTYPES, check_quantization

LOG_LEVELS = ("debug", "info", "warning", "error")
TIER_POLICIES = ("cost", "lru")


# Listening there means on every interface.
_ANY_HOST = re.compile(r"(^|//)(0\.0\.0\.0|\[::\]):")
_COUNTS = (
    "num_pages",
    "kv_cache_bytes",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "max_num_waiting",
    "max_num_pulls",
    "max_num_moves",
    "num_threads",
)


class Role(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"
    STORE = "store"  # keeps KV for others; no engine


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """What an operator decides about one worker. Facts found at start (addresses) are not here.

    `ValueError` names the setting, its value and what would be right.
    """

    role: Annotated[Role, "what the worker is for"]
    worker_id: Annotated[str, "name of the worker, unique in its cluster"]
    model_path: Annotated[Path, "directory with config.json and *.safetensors"]
    model_name: Annotated[str, "the name clients use"]
    dtype: Annotated[str, "of weights and activations: float32 or bfloat16"] = "float32"
    quantize: Annotated[str, "weights of products: none (in dtype); int8; on a GPU w8a16, w4a16 or fp8"] = (
        "none"
    )
    kv_dtype: Annotated[str, "of KV: auto (that of weights), or int8 or fp8 with triton or reference"] = (
        "auto"
    )
    device: Annotated[str, "what computes: cpu, cuda or cuda:N"] = "cpu"
    attention: Annotated[
        str | None,
        "kernels: numba (cpu), triton (cuda) or reference (their formulas, slow); default: the device's",
    ] = None
    num_pages: Annotated[int | None, "KV pages of 16 tokens; overrides --kv-cache-bytes"] = None
    kv_cache_bytes: Annotated[
        int | None, "memory for KV pages; default: 512 MiB of a cpu's, of a GPU's what a step leaves"
    ] = None
    max_model_len: Annotated[
        int | None, "tokens of prompt and output; default: what the model was made for"
    ] = None
    max_num_batched_tokens: Annotated[int, "tokens computed in one step, decodes first"] = 512
    max_num_seqs: Annotated[int, "requests running at a time"] = 64
    max_num_waiting: Annotated[int, "requests waiting; more are refused as overloaded"] = 1024
    max_num_pulls: Annotated[int, "hand-overs pulled from other workers at a time"] = 8
    max_num_moves: Annotated[int, "running requests that move to other workers at a time"] = 1
    scheduling_policy: Annotated[
        str, "who goes first: fcfs, priority, fair (between tenants) or deadline"
    ] = "priority"
    num_threads: Annotated[int, "threads that compute"] = 1
    cores: Annotated[tuple[int, ...], "cores to stay on, as 0,1; default: any"] = ()
    control_address: Annotated[str, "gRPC, host:port (port 0: any free one) or unix:/path"] = "127.0.0.1:0"
    data_address: Annotated[str, "KV data plane, tcp://host:port or unix:///path"] = "tcp://127.0.0.1:0"
    advertise_host: Annotated[str, "host that others reach us by, where we listen on 0.0.0.0"] = ""
    directory: Annotated[
        str, "gRPC targets that serve the directory, as a:1,b:2; default: register nowhere"
    ] = ""
    lease_s: Annotated[float, "how long computed KV is kept without progress of its puller"] = 30.0
    pull_timeout_s: Annotated[float, "deadline of one pull; past it the prompt is computed here"] = 60.0
    drain_timeout_s: Annotated[float, "how long a worker that stops may take to finish what it has"] = 30.0
    memory_tier_bytes: Annotated[int, "CPU memory for KV blocks beside the device pages; 0: no tiers"] = (
        256 * 2**20
    )
    disk_tier_path: Annotated[Path | None, "directory for KV blocks on disk; default: no disk tier"] = None
    disk_tier_bytes: Annotated[int, "what the disk tier may take"] = 2**30
    disk_tier_key: Annotated[str, "encrypts the disk tier: env:NAME or file:PATH of 32 bytes in hex"] = ""
    tier_policy: Annotated[str, "what tiers drop first: cost (recomputing per idle time) or lru"] = "cost"
    max_level: Annotated[int, "the most lossy level KV may be fetched at: 0 is raw, 1 nearly lossless"] = 1
    ttft_objective_s: Annotated[float, "KV is fetched at the least lossy level that keeps this"] = 0.5
    metrics_port: Annotated[int | None, "Prometheus over HTTP on this port; default: none"] = None
    log_level: Annotated[str, "debug, info, warning or error"] = "info"

    def __post_init__(self) -> None:
        for name in ("worker_id", "model_name", "control_address", "data_address"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        _one_of("dtype", self.dtype, WHOLE_DTYPES)
        check_quantization(self.quantize, dtype=self.dtype)
        _one_of("kv_dtype", self.kv_dtype, KV_DTYPES)
        if self.role is not Role.STORE:  # which computes nothing, and only says whose KV it keeps
            self.compute.check_quantization(self.quantize)
            self.compute.check_kv_dtype(self.kv_dtype)
        _one_of("log_level", self.log_level, LOG_LEVELS)
        _one_of("scheduling_policy", self.scheduling_policy, tuple(POLICIES))
        for name in _COUNTS:
            _at_least_one(name, getattr(self, name))
        _one_of("tier_policy", self.tier_policy, TIER_POLICIES)
        for name, least in (("memory_tier_bytes", 0), ("disk_tier_bytes", 1), ("max_level", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.disk_tier_path is not None and self.memory_tier_bytes == 0:
            raise ValueError("disk_tier_path needs memory_tier_bytes: blocks reach the disk through memory")
        if self.role is Role.STORE and self.memory_tier_bytes == 0:
            raise ValueError("memory_tier_bytes of a store must not be 0: it has nothing else")
        for name in ("lease_s", "pull_timeout_s", "drain_timeout_s", "ttft_objective_s"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a positive number of seconds, got {getattr(self, name)}")
        if self.metrics_port is not None and not 0 <= self.metrics_port < 2**16:
            raise ValueError(f"metrics_port must be between 0 and 65535, got {self.metrics_port}")
        if any(core < 0 for core in self.cores) or len(set(self.cores)) != len(self.cores):
            raise ValueError(f"cores must be distinct numbers from 0 on, got {self.cores}")
        parse_address(self.data_address)
        for name in ("control_address", "data_address"):
            if not self.advertise_host and _ANY_HOST.search(getattr(self, name)):
                raise ValueError(
                    f"advertise_host must be set with {name} {getattr(self, name)}: nobody can connect to that"
                )
        if self.max_num_batched_tokens < self.max_num_seqs:
            # Every running request decodes one token a step.
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least"
                f" max_num_seqs ({self.max_num_seqs})"
            )

    @property
    def compute(self) -> ComputeDevice:
        """Raises `ValueError` for kernels that do not fit the device."""
        return ComputeDevice(device=self.device, attention=self.attention)

    @property
    def directories(self) -> tuple[str, ...]:
        return tuple(target.strip() for target in self.directory.split(",") if target.strip())


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def setting_help() -> dict[str, str]:
    """The explanation of every setting, by field name."""
    hints = get_type_hints(WorkerConfig, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}
