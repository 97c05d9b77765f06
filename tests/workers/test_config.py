from pathlib import Path
from typing import Any

import pytest

from workers.config import Role, WorkerConfig, setting_help

GOOD: dict[str, Any] = {"role": Role.MIXED, "worker_id": "w", "model_path": Path("m"), "model_name": "demo"}


def test_the_required_settings_alone_make_a_valid_configuration() -> None:
    config = WorkerConfig(**GOOD)
    assert config.num_pages is None
    assert config.max_num_batched_tokens >= config.max_num_seqs


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"worker_id": ""}, "worker_id must not be empty"),
        ({"dtype": "int4"}, "dtype must be one of float32, bfloat16, got 'int4'"),
        ({"quantize": "int4"}, "quantize must be one of none, int8, w8a16, w4a16, fp8, got 'int4'"),
        ({"quantize": "int8", "dtype": "bfloat16"}, "quantize int8 needs dtype float32, got 'bfloat16'"),
        ({"kv_dtype": "int4"}, "kv_dtype must be one of auto, int8, fp8, got 'int4'"),
        ({"kv_dtype": "int8"}, "kv_dtype int8 is served with attention triton or reference, got numba"),
        ({"device": "tpu"}, "device must be one of cpu, cuda, cuda:N, got 'tpu'"),
        ({"device": "cuda", "attention": "numba"}, "attention numba computes on the cpu, got device cuda"),
        ({"device": "cuda", "quantize": "int8"}, "int8 is served with attention numba alone, got triton"),
        ({"log_level": "loud"}, "log_level must be one of"),
        ({"num_pages": 0}, "num_pages must be at least 1, got 0"),
        ({"max_num_waiting": -1}, "max_num_waiting must be at least 1, got -1"),
        ({"lease_s": 0.0}, "lease_s must be a positive number of seconds, got 0.0"),
        ({"pull_timeout_s": float("nan")}, "pull_timeout_s must be a positive"),
        ({"metrics_port": 70000}, "metrics_port must be between 0 and 65535, got 70000"),
        ({"cores": (1, 1)}, "cores must be distinct"),
        ({"control_address": "0.0.0.0:1"}, "advertise_host must be set with control_address"),
        ({"data_address": "tcp://[::]:1"}, "advertise_host must be set with data_address"),
        ({"max_num_seqs": 600}, "must be at least max_num_seqs"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_name_and_value(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorkerConfig(**(GOOD | wrong))


def test_every_setting_explains_itself() -> None:
    assert all(setting_help().values())
