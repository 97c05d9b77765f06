"""The seam between the launcher and the programs it starts: they must understand every flag it gives them."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from control_plane.config import ClusterConfig, load_config
from control_plane.config_workers import PoolConfig
from control_plane.runtimes.commands import WorkerPlace, control_command, environment, worker_command
from workers.__main__ import _parser
from workers.config import Role, WorkerConfig

EVERYTHING = PoolConfig(
    replicas=2,
    device="cuda:1",
    attention="reference",
    kv_cache_bytes=1 << 20,
    num_pages=100,
    max_num_batched_tokens=200,
    max_num_seqs=3,
    max_num_waiting=4,
    scheduling_policy="fair",
    num_threads=5,
    lease_s=6.5,
    pull_timeout_s=7.5,
    memory_tier_bytes=1 << 21,
    disk_tier_bytes=1 << 22,
    metrics_port=9100,
)


def understood(config: ClusterConfig, place: WorkerPlace) -> WorkerConfig:
    command = worker_command(config, place)
    assert command[1:4] == ["-P", "-m", "workers"]
    return WorkerConfig(**vars(_parser().parse_args(command[4:])))


@pytest.mark.parametrize("pool", ["prefill", "decode", "mixed", "store"])
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_a_worker_understands_the_flags_of_a_default_cluster(pool: str, transport: str) -> None:
    config = load_config(overrides=[f"transport={transport}", "run_dir=/r"])
    worker = understood(config, WorkerPlace(pool=pool, replica=0, name=f"{pool}-0", cores=(2, 3)))
    assert (worker.role, worker.worker_id, worker.num_threads) == (Role(pool), f"{pool}-0", 2)
    assert (worker.model_path, worker.model_name) == (config.model.path, config.model.name)
    if transport == "unix":
        assert worker.directory == "unix:/r/sockets/directory.sock"
        assert worker.control_address == f"unix:/r/sockets/{pool}-0.control.sock"
        assert worker.data_address == f"unix:///r/sockets/{pool}-0.data.sock"
    else:
        assert worker.directory == "127.0.0.1:8002"
        assert worker.control_address == "127.0.0.1:0"


def test_every_setting_of_a_pool_reaches_its_workers() -> None:
    config = load_config()
    config = replace(config, pools=replace(config.pools, decode=EVERYTHING))
    worker = understood(config, WorkerPlace(pool="decode", replica=0, name="decode-1", cores=(0,)))
    for field in fields(PoolConfig):
        if field.name != "replicas":
            assert getattr(worker, field.name) == getattr(EVERYTHING, field.name)


def test_each_replica_serves_its_metrics_on_the_next_port() -> None:
    config = load_config(overrides=["pools.decode={replicas: 3, metrics_port: 9100}"])
    places = [
        WorkerPlace(pool="decode", replica=replica, name=f"decode-{replica}", cores=(0,))
        for replica in range(3)
    ]
    assert [understood(config, place).metrics_port for place in places] == [9100, 9101, 9102]
    assert understood(config, replace(places[0], pool="prefill")).metrics_port is None


def test_every_setting_of_the_model_reaches_the_workers() -> None:
    overrides = ["model.path=/m", "model.name=n", "model.dtype=bfloat16", "model.max_model_len=64"]
    worker = understood(
        load_config(overrides=overrides), WorkerPlace(pool="mixed", replica=0, name="mixed-0", cores=(0,))
    )
    assert (worker.model_path, worker.model_name) == (Path("/m"), "n")
    assert (worker.dtype, worker.quantize, worker.max_model_len) == ("bfloat16", "none", 64)


def test_every_worker_and_store_quantizes_alike() -> None:
    config = load_config(overrides=["model.quantize=int8", "pools.store.replicas=1"])
    places = [
        WorkerPlace(pool=pool, replica=0, name=f"{pool}-0", cores=(0,))
        for pool in ("prefill", "decode", "mixed", "store")
    ]
    assert [understood(config, place).quantize for place in places] == ["int8"] * 4


def test_every_worker_and_store_has_kv_of_one_dtype() -> None:
    overrides = ["model.kv_dtype=int8", "pools.store.replicas=1"]
    overrides += [f"pools.{pool}.attention=reference" for pool in ("prefill", "decode", "mixed")]
    config = load_config(overrides=overrides)
    places = [
        WorkerPlace(pool=pool, replica=0, name=f"{pool}-0", cores=(0,))
        for pool in ("prefill", "decode", "mixed", "store")
    ]
    assert [understood(config, place).kv_dtype for place in places] == ["int8"] * 4


def test_every_setting_of_the_tiers_reaches_the_workers() -> None:
    overrides = [
        "run_dir=/r",
        "kv={memory_tier_bytes: 1048576, disk_tier_bytes: 2000, disk_key: 'env:KEY', tier_policy: lru}",
        "kv.max_level=3",
        "kv.ttft_objective_s=0.25",
    ]
    place = WorkerPlace(pool="prefill", replica=0, name="prefill-7", cores=(0,))
    worker = understood(load_config(overrides=overrides), place)
    assert (worker.memory_tier_bytes, worker.disk_tier_bytes) == (2**20, 2000)
    assert (worker.disk_tier_path, worker.disk_tier_key) == (Path("/r/kv/prefill-7"), "env:KEY")
    assert (worker.tier_policy, worker.max_level, worker.ttft_objective_s) == ("lru", 3, 0.25)


def test_a_worker_without_a_disk_tier_gets_no_directory() -> None:
    decode = WorkerPlace(pool="decode", replica=0, name="decode-0", cores=(0,))
    assert understood(load_config(), decode).disk_tier_path is None
    place = WorkerPlace(pool="prefill", replica=0, name="prefill-0", cores=(0,))
    assert understood(load_config(overrides=["kv.disk_tier_bytes=0"]), place).disk_tier_path is None
    assert understood(load_config(overrides=["kv.memory_tier_bytes=0"]), place).disk_tier_path is None


def test_workers_are_told_of_every_directory() -> None:
    overrides = [
        "gateway.replicas=2",
        "gateway.grpc_port=9000",
        "directory.redis_url=redis://h",
        "run_dir=/r",
    ]
    place = WorkerPlace(pool="store", replica=0, name="store-0", cores=())
    worker = understood(load_config(overrides=overrides), place)
    assert worker.directory == "unix:/r/sockets/directory.sock,unix:/r/sockets/directory-1.sock"
    assert worker.num_threads == 1


def test_the_control_process_gets_the_settings_in_effect() -> None:
    command = control_command(Path("/r/effective.yaml"), 1)
    assert command[2:] == ["-m", "control_plane.gateway", "--config", "/r/effective.yaml", "--replica", "1"]


def test_numeric_libraries_are_told_their_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    given = environment(3)
    assert {given["OMP_NUM_THREADS"], given["MKL_NUM_THREADS"], given["NUMBA_NUM_THREADS"]} == {"3"}


def test_a_pool_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="'decoder', but it must be one of: prefill, decode, mixed"):
        worker_command(load_config(), WorkerPlace(pool="decoder", replica=0, name="x", cores=(0,)))
