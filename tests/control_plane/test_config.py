import dataclasses
import functools
import operator
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.config import PROJECT_ROOT, ClusterConfig, load_config
from control_plane.strict_yaml import ConfigError, build, dump


def load_text(text: str, directory: Path, *overrides: str) -> ClusterConfig:
    path = directory / "cluster.yaml"
    path.write_text(text)
    return load_config(path, overrides=overrides)


def leaf_paths(config: object, prefix: str = "") -> list[str]:
    paths = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        path = f"{prefix}{field.name}"
        paths += leaf_paths(value, f"{path}.") if dataclasses.is_dataclass(value) else [path]
    return paths


LEAVES = leaf_paths(ClusterConfig())


def test_the_documentation_lists_every_setting_with_its_default() -> None:
    text = (PROJECT_ROOT / "docs" / "configuration.md").read_text()
    documented = dict(re.findall(r"^\| `([a-z_.*]+)` \| (.+?) \|", text, flags=re.MULTILINE))
    raw = yaml.safe_load(dump(ClusterConfig()))
    assert set(documented) == {re.sub(r"^pools\.[a-z]+", "pools.*", path) for path in LEAVES}
    for path in LEAVES:
        default = functools.reduce(operator.getitem, path.split("."), raw)
        described = (
            "model.path", "model.max_model_len", "run_dir", "kv.disk_path", "gateway.max_queued_per_tenant"
        )  # fmt: skip
        if not path.startswith("pools.") and path not in described:
            assert documented[path] == (f"`{default}`" if default != "" else '`""`'), path


def test_without_a_file_the_demo_model_is_served_from_the_project() -> None:
    config = load_config()
    assert config.model.path == PROJECT_ROOT / "models" / "demo"
    assert config.run_dir == Path.cwd() / "run"


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_text("", tmp_path) == load_config()
    assert load_text("gateway:\n  # port: 1\n", tmp_path) == load_config()


def test_a_file_says_only_what_differs(tmp_path: Path) -> None:
    config = load_text(
        "pools: {decode: {num_pages: 100}, prefill: {replicas: 3}}\ngateway: {port: 9}", tmp_path
    )
    assert (config.pools.decode.num_pages, config.pools.decode.replicas) == (100, 1)
    assert config.pools.prefill.replicas == 3
    assert config.gateway == dataclasses.replace(ClusterConfig().gateway, port=9)


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    text = "pools: {decode: {replicas: 2}}"
    config = load_text(text, tmp_path, "pools.decode.replicas=3", "pools.decode.replicas=4", "transport=tcp")
    assert config.pools.decode.replicas == 4
    assert config.transport == "tcp"


def test_file_and_overrides_are_judged_together(tmp_path: Path) -> None:
    text = "pools: {decode: {replicas: 0}}"
    assert load_text(text, tmp_path, "pools.mixed.replicas=1").pools.mixed.replicas == 1
    with pytest.raises(ConfigError, match=r"pools\.decode\.replicas and mixed\.replicas are both 0"):
        load_text(text, tmp_path)


def test_paths_of_a_file_start_at_the_file_and_those_of_overrides_at_the_working_directory(
    tmp_path: Path,
) -> None:
    text = "model: {path: checkpoints/tiny}\nrun_dir: here"
    config = load_text(text, tmp_path, "transport=tcp")
    assert config.model.path == tmp_path / "checkpoints" / "tiny"
    assert config.run_dir == tmp_path / "here"
    overrides = ["model.path=other", "run_dir=there", "kv.disk_path=ssd"]
    config = load_text(text, tmp_path, "transport=tcp", *overrides)
    assert config.model.path == Path.cwd() / "other"
    assert config.run_dir == Path.cwd() / "there"
    assert config.kv_dir == Path.cwd() / "ssd"


def test_a_model_without_a_name_is_named_after_its_directory() -> None:
    assert load_config(overrides=["model.path=/models/tiny-llama/"]).model.name == "tiny-llama"
    assert load_config(overrides=["model.path=/models/tiny", "model.name=mine"]).model.name == "mine"


def test_the_text_of_an_override_is_yaml() -> None:
    config = load_config(overrides=["model.path='my model'", 'model.name="8"', "pools.prefill={replicas: 2}"])
    assert config.model.path == Path.cwd() / "my model"
    assert config.model.name == "8"
    assert config.pools.prefill.replicas == 2


@settings(deadline=None)
@given(st.data())
def test_what_is_dumped_loads_as_the_same_settings(data: st.DataObject) -> None:
    numbers = st.integers(1, 99)
    names = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1)
    config = build(
        ClusterConfig(),
        {
            "model": {
                "name": data.draw(names),
                "path": "/m",
                "max_model_len": data.draw(st.none()),
            },
            "gateway": {"request_timeout_s": data.draw(st.floats(0.1, 86_400)), "port": data.draw(numbers)},
            "pools": {
                pool: {
                    "replicas": data.draw(numbers),
                    "num_pages": data.draw(st.none() | st.integers(2, 10**9)),
                }
                for pool in ("prefill", "decode", "mixed")
            },
            "transport": data.draw(st.sampled_from(["unix", "tcp"])),
        },
        directory=Path("/"),
    )
    assert build(ClusterConfig(), yaml.safe_load(dump(config)), directory=Path("/elsewhere")) == config


@pytest.mark.parametrize("path", LEAVES)
def test_a_misspelt_key_is_an_error_that_names_the_nearest_one(path: str) -> None:
    section, _, key = path.rpartition(".")
    misspelt = f"{section}.{key}x".lstrip(".")
    with pytest.raises(ConfigError) as error:
        load_config(overrides=[f"{misspelt}=1"])
    assert str(error.value) == f"{misspelt} is not a setting; did you mean {key}?"


@pytest.mark.parametrize("path", LEAVES)
@pytest.mark.parametrize("value", ["[1]", "{a: 1}", "yes", ".nan", "2020-01-01", "''", '"\\0"'])
def test_a_value_of_another_type_is_an_error_that_names_the_path(path: str, value: str) -> None:
    optional = ("directory.redis_url", "kv.disk_key", "gateway.tenant_header", "gateway.tenant_weights")
    if value == "''" and path in optional:
        return  # empty is what they are without one
    if value == "yes" and path == "migration.enabled":
        return  # it is one of the words for true
    with pytest.raises(ConfigError, match=rf"^{path} is "):
        load_config(overrides=[f"{path}={value}"])


@pytest.mark.parametrize(
    "path", [path for path in LEAVES if path.endswith(("_s", ".port", "replicas", "num_seqs"))]
)
@pytest.mark.parametrize("value", [-1, 10**12])
def test_a_number_out_of_bounds_is_an_error_that_names_path_and_bounds(path: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"^{path} is {value}(\.0)?, but it must be between .* and "):
        load_config(overrides=[f"{path}={value}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gateway: {port: 1, port: 2}", r"line 1: key 'port' is given twice"),
        ("gateway:\n  port: 1\npools:\n  decode: {}\ngateway: {}", r"line 5: key 'gateway' is given twice"),
        ("[1, 2]", r"the top level is a list"),
        ("just text", r"the top level is 'just text'"),
        ("gateway: 3", r"gateway is 3 \(a number\), but it must be a mapping"),
        ("gateway: [", r"line 1: "),
        ("gateway: !!python/object:os.system {}", r"line 1: could not determine a constructor"),
        ("a: \x00", "not YAML"),
        ("? [1]\n: 2", "unhashable|not text|is not a setting"),
        ("1: 2", "^.*1 is not a setting"),
        ("gatway: {}", "gatway is not a setting; did you mean gateway?"),
        ("model: {dtype: float23}", "must be one of: float32, bfloat16$"),
        ("model: {quantize: int4}", "must be one of: none, int8, w8a16, w4a16, fp8$"),
        (
            "model: {quantize: int8, dtype: bfloat16}",
            r"model\.quantize is int8, which needs dtype float32, not bfloat16",
        ),
        (
            "pools: {decode: {device: tpu}}",
            r"pools\.decode\.device is 'tpu', but it must be cpu, cuda or cuda:N",
        ),
        (
            "pools: {decode: {device: cuda, attention: numba}}",
            r"pools\.decode\.attention is numba, which computes on a CPU, but device is cuda",
        ),
        ("pools: {store: {device: cuda}}", r"pools\.store\.device is cuda, but a store has no engine"),
        (
            "{model: {quantize: int8}, pools: {mixed: {device: 'cuda:1'}}}",
            r"pools\.mixed\.device is cuda:1, but model\.quantize is int8, which only a CPU's own",
        ),
        (
            "{model: {quantize: int8}, pools: {mixed: {attention: reference}}}",
            r"pools\.mixed\.attention is reference, but model\.quantize is int8",
        ),
        (
            "{model: {quantize: w4a16}, pools: {prefill: {device: cuda}}}",
            r"pools\.decode\.device is cpu, but model\.quantize is w4a16, which only a GPU's kernels serve",
        ),
        ("model: {kv_dtype: int4}", "must be one of: auto, int8, fp8$"),
        (
            "{model: {kv_dtype: fp8}, pools: {prefill: {device: cuda}}}",
            r"pools\.decode\.device is cpu, but model\.kv_dtype is fp8, which only a GPU's kernels serve",
        ),
        ("model: {name: 8}", r"model\.name is 8 \(a number\), but it must be text"),
        (
            "pools: {decode: {num_pages: 1.5}}",
            r"pools\.decode\.num_pages is 1\.5 \(a number\).*a whole number",
        ),
        ("directory: {heartbeat_s: 5}", r"directory\.ttl_s is 2\.0, but one late heartbeat"),
        ("gateway: {port: 8001}", r"gateway\.grpc_port is 8001, which is port as well"),
        ("pools: {decode: {metrics_port: 0}}", r"pools\.decode\.metrics_port is 0, .* between 1 and 65535"),
        (
            "pools: {decode: {replicas: 3, metrics_port: 65534}}",
            r"metrics_port is 65534, .* between 1 and 65533",
        ),
        (
            "pools: {decode: {replicas: 3, metrics_port: 7998}}",
            r"pools\.decode\.metrics_port needs port 8000, but gateway\.port has it",
        ),
        (
            "pools: {prefill: {replicas: 2, metrics_port: 9100}, decode: {metrics_port: 9101}}",
            r"pools\.decode\.metrics_port needs port 9101, but pools\.prefill\.metrics_port has it",
        ),
        (
            "{transport: tcp, pools: {decode: {metrics_port: 8002}}}",
            r"pools\.decode\.metrics_port needs port 8002, but directory\.port has it",
        ),
        ("gateway: {tenant_header: 'a b'}", r"gateway\.tenant_header is 'a b', but it must be the name"),
        (
            "gateway: {tenant_weights: 'a=0'}",
            r"gateway\.tenant_weights is 'a=0', but 'a=0' must be NAME=WEIGHT",
        ),
        (
            "gateway: {max_queued_requests: 5, max_queued_per_tenant: 6}",
            r"gateway\.max_queued_per_tenant is 6, but it must be between 0 and 5",
        ),
        ("gateway: {replicas: 2}", r"gateway\.replicas is 2, but .* through Redis: set directory\.redis_url"),
        (
            "{gateway: {replicas: 2, port: 8000, grpc_port: 8001}, directory: {redis_url: 'redis://h'}}",
            r"gateway\.grpc_port needs port 8001, but gateway\.port has it for replica number 2: .*--grpc-port 8100",
        ),
        (
            "directory: {redis_url: 'http://:secret@h'}",
            r"redis_url is not a URL that begins with .*rediss://",
        ),
        ("directory: {redis_prefix: ''}", r"directory\.redis_prefix is empty"),
        ("kv: {disk_key: 'aabb'}", r"kv\.disk_key is not a reference: it must be env:NAME or file:/PATH"),
        ("kv: {memory_tier_bytes: 1000}", r"kv\.memory_tier_bytes is 1000, but it must be 0, .* 1048576"),
        (
            "pools: {store: {memory_tier_bytes: -1}}",
            r"pools\.store\.memory_tier_bytes is -1, but it must be 0",
        ),
        ("kv: {tier_policy: fifo}", r"must be one of: cost, lru"),
        ("pools: {store: {replicas: 1, num_pages: 64}}", r"pools\.store\.num_pages is 64, but .* no engine"),
        (
            "{kv: {memory_tier_bytes: 0}, pools: {store: {replicas: 1}}}",
            r"pools\.store\.memory_tier_bytes is 0, but a store has nothing else",
        ),
        (
            "{kv: {memory_tier_bytes: 0}, pools: {decode: {disk_tier_bytes: 1000}}}",
            r"pools\.decode\.disk_tier_bytes is 1000, but blocks reach the disk through memory",
        ),
        ("gateway: {drain_timeout_s: 20}", "stop_timeout_s is 15, but the gateway must have time to drain"),
        ("run_dir: /" + "x" * 100, r"run_dir is /x+: the path of its sockets directory has 109 bytes"),
        (
            "routing: {weights: {queue: 0, free_pages: 0, prefix_overlap: 0}}",
            r"routing\.weights\.prefix_overlap, ",
        ),
    ],
)
def test_a_wrong_file_is_an_error_of_one_line_that_names_the_file(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_text(text, tmp_path)
    assert str(error.value).startswith(str(tmp_path / "cluster.yaml"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pools.decode.replicas", "is not an override: write KEY.PATH=VALUE"),
        ("=3", "is not an override"),
        ("pools..replicas=3", "is not an override"),
        ("transport.kind=tcp", "transport is a mapping, but it must be one of"),
        ("gateway.port=[1", "the value of gateway.port"),
    ],
)
def test_a_wrong_override_is_an_error(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[override])


def test_ports_that_nobody_uses_collide_with_nobody() -> None:
    overrides = [
        "pools.decode.metrics_port=8002",  # the directory's, which is a socket file here
        "pools.mixed.metrics_port=8002",  # of a pool without replicas
        "gateway.port=0",
        "gateway.grpc_port=0",
    ]
    assert load_config(overrides=overrides).pools.decode.metrics_port == 8002


def test_a_secret_in_the_wrong_place_is_not_repeated() -> None:
    for override in ("directory.redis_url='http://:secret@h'", "kv.disk_key=secret"):
        with pytest.raises(ConfigError) as error:
            load_config(overrides=[override])
        assert "secret" not in str(error.value)


def test_each_control_process_has_a_directory_address_of_its_own() -> None:
    overrides = [
        "gateway.replicas=2",
        "gateway.grpc_port=9000",
        "directory.redis_url=redis://h",
        "run_dir=/r",
    ]
    unix = load_config(overrides=overrides)
    assert unix.directory_addresses == (
        "unix:/r/sockets/directory.sock",
        "unix:/r/sockets/directory-1.sock",
    )
    tcp = load_config(overrides=[*overrides, "transport=tcp"])
    assert tcp.directory_addresses == ("127.0.0.1:8002", "127.0.0.1:8003")


def test_a_pool_may_differ_from_the_rest_in_the_sizes_of_its_tiers() -> None:
    config = load_config(overrides=["pools.prefill.memory_tier_bytes=0"])
    kv, pools = config.kv, config.pools
    assert (kv.memory_bytes(pools.mixed), kv.disk_bytes(pools.mixed)) == (256 * 2**20, 512 * 2**20)
    assert (kv.memory_bytes(pools.decode), kv.disk_bytes(pools.decode)) == (256 * 2**20, 0)
    # Blocks reach the disk through memory.
    assert (kv.memory_bytes(pools.prefill), kv.disk_bytes(pools.prefill)) == (0, 0)


def test_an_override_inside_a_value_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"gateway\.port is 1 \(a number\), so gateway\.port\.x cannot be set"
    ):
        load_text("gateway: {port: 1}", tmp_path, "gateway.port.x=2")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: {name: caf\xe9}")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(tmp_path / "latin.yaml")


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=6,
    ),
    st.sampled_from(LEAVES),
)
def test_no_value_whatever_gets_through_unchecked(value: Any, path: str) -> None:
    """Either the settings are valid and hold a value of the declared type, or it is a ConfigError; nothing else."""
    raw: dict[str, Any] = {}
    section = raw
    *sections, key = path.split(".")
    for name in sections:
        section = section.setdefault(name, {})
    section[key] = value
    try:
        config: Any = build(ClusterConfig(), raw, directory=Path("/"))
    except ConfigError:
        return
    for name in path.split("."):
        config = getattr(config, name)
    assert config is None or isinstance(config, bool | int | float | str | Path)
