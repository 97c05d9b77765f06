"""`ClusterConfig`: every setting of a cluster, its default and its bounds. One YAML file; flags override it.

`load_config` is the only way in. Relative paths in a file are taken from the file's directory, those of
overrides from the working directory. Facts that are measured at start (how many pages fit, which ports were
free) are not settings: `None` leaves them to the worker.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from control_plane.config_migration import MigrationConfig
from control_plane.config_workers import KvConfig, PoolsConfig, bounded
from control_plane.gateway.tenancy import parse_weights
from control_plane.strict_yaml import ConfigError, RawMapping, build, parse_mapping, set_override

PROJECT_ROOT = Path(__file__).resolve().parent.parent
# sun_path holds 108 bytes with its terminator; a name such as "/decode-99-control.sock" follows.
MAX_SOCKET_DIR_BYTES = 80
SOCKET_DIR = "sockets"  # in run_dir
_HEADER = re.compile(r"[A-Za-z0-9-]*")
REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    name: str = "penstock-demo"  # what clients put into "model"
    path: Path = PROJECT_ROOT / "models" / "demo"  # a directory in Hugging Face's layout
    dtype: Literal["float32", "bfloat16"] = "float32"
    # The weights of products: int8 on a CPU, the last three on a GPU.
    quantize: Literal["none", "int8", "w8a16", "w4a16", "fp8"] = "none"
    # Of KV: auto is dtype. The others halve bfloat16's, on a GPU.
    kv_dtype: Literal["auto", "int8", "fp8"] = "auto"
    max_model_len: int | None = None  # tokens, prompt and output together; None: what the checkpoint says

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name is empty, but clients must be able to name the model")
        if self.quantize == "int8" and self.dtype != "float32":
            raise ValueError(f"quantize is {self.quantize}, which needs dtype float32, not {self.dtype}")
        bounded("max_model_len", self.max_model_len, low=16, high=1 << 24)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    host: str = "127.0.0.1"
    port: int = 8000  # HTTP; 0 takes a free one
    grpc_port: int = 8001  # the public gRPC API; 0 takes a free one
    replicas: int = 1  # control processes; each further one takes the next ports. More than one need Redis
    max_concurrent_requests: int = 256  # being generated at the same time
    max_queued_requests: int = 512  # waiting beyond those; one more is answered with 429
    max_queued_per_tenant: int | None = None  # of those; None: as many as of all
    tenant_header: str = ""  # names the tenant; to be set by whoever authenticates clients in front of us
    tenant_weights: str = ""  # shares of tenants beside each other, as gold=3,free=0.5; others have 1
    request_timeout_s: float = 600.0
    worker_wait_s: float = (
        30.0  # for a worker to come back, if the last one that could serve a request has gone
    )
    stream_write_timeout_s: float = 30.0  # a client that reads nothing for so long is dropped
    max_body_bytes: int = 8 * 1024 * 1024
    drain_timeout_s: float = 10.0  # at a stop, for running requests to finish

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError(
                "host is empty, but it must be an address of this machine, such as 127.0.0.1 or 0.0.0.0"
            )
        bounded("replicas", self.replicas, low=1, high=16)
        bounded("port", self.port, low=0, high=65536 - self.replicas)
        bounded("grpc_port", self.grpc_port, low=0, high=65536 - self.replicas)
        if self.port == self.grpc_port != 0:
            raise ValueError(
                f"grpc_port is {self.grpc_port}, which is port as well: HTTP and gRPC need two ports"
            )
        bounded("max_concurrent_requests", self.max_concurrent_requests, low=1, high=1_000_000)
        bounded("max_queued_requests", self.max_queued_requests, low=0, high=1_000_000)
        bounded("max_queued_per_tenant", self.max_queued_per_tenant, low=0, high=self.max_queued_requests)
        if not _HEADER.fullmatch(self.tenant_header):
            raise ValueError(f"tenant_header is {self.tenant_header!r}, but it must be the name of a header")
        try:
            parse_weights(self.tenant_weights)
        except ValueError as error:
            raise ValueError(f"tenant_weights is {self.tenant_weights!r}, but {error}") from error
        bounded("request_timeout_s", self.request_timeout_s, low=0.1, high=86_400)
        bounded("worker_wait_s", self.worker_wait_s, low=0, high=86_400)
        bounded("stream_write_timeout_s", self.stream_write_timeout_s, low=0.1, high=3600)
        bounded("max_body_bytes", self.max_body_bytes, low=1024, high=1 << 31)
        bounded("drain_timeout_s", self.drain_timeout_s, low=0, high=3600)


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectoryConfig:
    """`host` and `port` count with `transport: tcp`; with `unix` the directory is a socket in `run_dir`."""

    host: str = "127.0.0.1"
    port: int = 8002  # 0 takes a free one
    heartbeat_s: float = 0.5
    ttl_s: float = 2.0  # silence after which a worker is dropped
    redis_url: str = ""  # several control processes share workers and blocks there; empty: in the one process
    redis_prefix: str = "penstock"  # of every key

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError(
                "host is empty, but it must be an address of this machine, such as 127.0.0.1 or 0.0.0.0"
            )
        bounded("port", self.port, low=0, high=65535)
        bounded("heartbeat_s", self.heartbeat_s, low=0.01, high=60)
        bounded("ttl_s", self.ttl_s, low=0.02, high=600)
        if self.ttl_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"ttl_s is {self.ttl_s}, but one late heartbeat must not drop a worker: "
                f"at least {2 * self.heartbeat_s:g}, twice heartbeat_s"
            )
        if self.redis_url and not self.redis_url.startswith(REDIS_SCHEMES):
            # Without the value: it may hold a password.
            raise ValueError(f"redis_url is not a URL that begins with one of: {', '.join(REDIS_SCHEMES)}")
        if not self.redis_prefix:
            raise ValueError("redis_prefix is empty, but other users of that Redis must be told from us")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerWeights:
    """How much each score in [0, 1] counts in the choice of a worker; 0 switches it off."""

    prefix_overlap: float = 2.0  # how much of the prompt the worker holds already
    queue: float = 1.0  # how little waits there
    free_pages: float = 1.0  # how much KV memory is free there

    def __post_init__(self) -> None:
        bounded("prefix_overlap", self.prefix_overlap, low=0, high=1000)
        bounded("queue", self.queue, low=0, high=1000)
        bounded("free_pages", self.free_pages, low=0, high=1000)
        if self.prefix_overlap == self.queue == self.free_pages == 0:
            raise ValueError("prefix_overlap, queue and free_pages are all 0, but one of them must decide")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingConfig:
    # Fewer uncached tokens than this are computed by the decode worker: a hand-over would cost more.
    prefill_threshold_tokens: int = 64
    weights: ScorerWeights = field(default_factory=ScorerWeights)

    def __post_init__(self) -> None:
        bounded("prefill_threshold_tokens", self.prefill_threshold_tokens, low=0, high=1 << 24)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    directory: DirectoryConfig = field(default_factory=DirectoryConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    migration: MigrationConfig = field(default_factory=MigrationConfig)
    pools: PoolsConfig = field(default_factory=PoolsConfig)
    kv: KvConfig = field(default_factory=KvConfig)
    transport: Literal["unix", "tcp"] = "unix"  # between the processes of this cluster
    run_dir: Path = field(default_factory=lambda: Path.cwd() / "run")  # logs, state, sockets
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    start_timeout_s: float = 300.0  # for everything to be ready
    stop_timeout_s: float = 15.0  # after which a process that does not stop is killed

    def __post_init__(self) -> None:
        bounded("start_timeout_s", self.start_timeout_s, low=1, high=86_400)
        bounded("stop_timeout_s", self.stop_timeout_s, low=0.1, high=3600)
        if self.stop_timeout_s <= self.gateway.drain_timeout_s:
            raise ValueError(
                f"stop_timeout_s is {self.stop_timeout_s:g}, but the gateway must have time to drain: "
                f"more than gateway.drain_timeout_s, {self.gateway.drain_timeout_s:g}"
            )
        if not self.run_dir.is_absolute():
            raise ValueError(f"run_dir is {self.run_dir}, but it must be absolute")
        if self.gateway.replicas > 1 and not self.directory.redis_url:
            raise ValueError(
                f"gateway.replicas is {self.gateway.replicas}, but several gateways share their directory "
                "through Redis: set directory.redis_url"
            )
        self._refuse_tiers_without_memory()
        self._refuse_weights_of_other_kernels()
        self._refuse_pages_of_other_kernels()
        bounded("directory.port", self.directory.port, low=0, high=65536 - self.gateway.replicas)
        self._refuse_shared_ports()
        length = len(str(self.socket_dir).encode())
        if self.transport == "unix" and length > MAX_SOCKET_DIR_BYTES:
            raise ValueError(
                f"run_dir is {self.run_dir}: the path of its sockets directory has {length} bytes, but Unix "
                f"sockets allow {MAX_SOCKET_DIR_BYTES}; choose a shorter one or set transport: tcp"
            )

    def _refuse_tiers_without_memory(self) -> None:
        for name, pool in self.pools.by_name().items():
            memory_bytes = self.kv.memory_bytes(pool)
            if memory_bytes == 0 and name == "store" and pool.replicas:
                raise ValueError(
                    "pools.store.memory_tier_bytes is 0, but a store has nothing else to keep KV in"
                )
            if memory_bytes == 0 and pool.disk_tier_bytes:
                raise ValueError(
                    f"pools.{name}.disk_tier_bytes is {pool.disk_tier_bytes}, but blocks reach the disk through "
                    "memory, and memory_tier_bytes is 0"
                )

    def _refuse_weights_of_other_kernels(self) -> None:
        for name, pool in self.pools.by_name().items():
            if self.model.quantize == "none" or name == "store":
                continue
            given = f"pools.{name}.{pool.kernels}"
            if self.model.quantize == "int8" and not pool.has_cpu_kernels:
                raise ValueError(f"{given}, but model.quantize is int8, which only a CPU's own kernels serve")
            if self.model.quantize != "int8" and pool.has_cpu_kernels and pool.replicas:
                raise ValueError(
                    f"{given}, but model.quantize is {self.model.quantize}, which only a GPU's kernels serve: "
                    "on a CPU it is none or int8"
                )

    def _refuse_pages_of_other_kernels(self) -> None:
        for name, pool in self.pools.by_name().items():
            if self.model.kv_dtype == "auto" or name == "store":
                continue
            if pool.has_cpu_kernels and pool.replicas:
                raise ValueError(
                    f"pools.{name}.{pool.kernels}, but model.kv_dtype is {self.model.kv_dtype}, which only a GPU's "
                    "kernels serve: on a CPU it is auto"
                )

    def _refuse_shared_ports(self) -> None:
        owners: dict[int, tuple[str, int]] = {}
        for setting, replica, port in self._fixed_ports():
            other, other_replica = owners.setdefault(port, (setting, replica))
            if other != setting:
                whose = f" for replica number {other_replica + 1}" if other_replica else ""
                is_grpc = setting == "gateway.grpc_port"
                hint = f", such as --grpc-port {self.gateway.port + 100}" if is_grpc else ""
                raise ValueError(
                    f"{setting} needs port {port}, but {other} has it{whose}: choose another{hint}"
                )

    def _fixed_ports(self) -> Iterator[tuple[str, int, int]]:
        """Every port that the settings name, with the setting and the replica of the process that needs it."""
        first = {"gateway.port": self.gateway.port, "gateway.grpc_port": self.gateway.grpc_port}
        if self.transport == "tcp":
            first["directory.port"] = self.directory.port
        for setting, port in first.items():
            if port != 0:
                yield from ((setting, replica, port + replica) for replica in range(self.gateway.replicas))
        for name, pool in self.pools.by_name().items():
            if pool.metrics_port is not None:
                for replica in range(pool.replicas):
                    yield f"pools.{name}.metrics_port", replica, pool.metrics_port + replica

    @property
    def socket_dir(self) -> Path:
        return self.run_dir / SOCKET_DIR

    @property
    def kv_dir(self) -> Path:
        """Holds a directory for each worker's disk tier. It is not removed at a stop."""
        return self.kv.disk_path or self.run_dir / "kv"

    @property
    def directory_addresses(self) -> tuple[str, ...]:
        """The gRPC targets at which the control processes serve the directory and workers find it."""
        replicas = range(self.gateway.replicas)
        if self.transport == "unix":
            return tuple(f"unix:{self.socket_dir / directory_socket(replica)}" for replica in replicas)
        port = self.directory.port
        return tuple(f"{self.directory.host}:{replica_port(port, replica)}" for replica in replicas)


def directory_socket(replica: int) -> str:
    return f"directory-{replica}.sock" if replica else "directory.sock"


def replica_port(first_port: int, replica: int) -> int:
    """The port of a process's `replica`, counted from 0; any free one stays any free one."""
    return first_port + replica if first_port else 0


def load_config(path: Path | None = None, *, overrides: Sequence[str] = ()) -> ClusterConfig:
    """The settings of a YAML file (without one: the defaults) with `KEY.PATH=VALUE` overrides in order.

    Raises ConfigError: one line, with the key's path, its value and what would be right.
    """
    raw: RawMapping = {}
    if path is not None:
        raw = parse_mapping(_read(path), source=str(path))
    for assignment in overrides:
        _set_from_working_directory(raw, assignment)
    _name_after_path(raw)
    try:
        return build(ClusterConfig(), raw, directory=path.resolve().parent if path else Path.cwd())
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}" if path and not overrides else str(e)) from e


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {e.start})") from e


def _set_from_working_directory(raw: RawMapping, assignment: str) -> None:
    set_override(raw, assignment)
    match raw, assignment.partition("=")[0].strip():
        case {"run_dir": str(path)}, "run_dir" if path:
            raw["run_dir"] = str(Path.cwd() / Path(path).expanduser())
        case {"model": {"path": str(path)}}, "model.path" if path:
            raw["model"]["path"] = str(Path.cwd() / Path(path).expanduser())
        case {"kv": {"disk_path": str(path)}}, "kv.disk_path" if path:
            raw["kv"]["disk_path"] = str(Path.cwd() / Path(path).expanduser())


def _name_after_path(raw: RawMapping) -> None:
    """A model that somebody brings without a name gets its directory's name, not the default model's."""
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(model.get("path"), str) and "name" not in model:
        model["name"] = Path(model["path"]).name
