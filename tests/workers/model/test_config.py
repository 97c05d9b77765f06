"""What configs mean, in old and new spellings, and which are refused by name."""

from typing import Any

import pytest

from workers.errors import CheckpointError
from workers.model.config import parse_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"]}


def test_missing_settings_have_the_defaults_of_the_family() -> None:
    config = parse_config(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.qkv_bias, config.tied_embeddings) == (
        4,
        16,
        False,
        False,
    )
    assert (config.rope.kind, config.rope.theta) == ("default", 10000.0)


def test_both_spellings_of_rope_mean_the_same() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    new = {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    assert parse_config(old) == parse_config(new)
    assert parse_config(old).rope.theta == 5e5


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, [None, None, None]),
        ({"sliding_window": 9, "use_sliding_window": False}, [None, None, None]),
        ({"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}, [None, None, 9]),
        (
            {
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            [9, None, 9],
        ),
    ],
)
def test_windows_of_qwen_depend_on_the_layer(changes: dict[str, Any], windows: list[int | None]) -> None:
    assert [layer.window for layer in parse_config({**QWEN2, **changes}).layers] == windows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "unsupported architecture GPT2LMHeadModel; supported: LlamaFor",
        ),
        ({"architectures": []}, "unsupported architecture none named"),
        ({"hidden_act": "gelu"}, "unsupported hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "unsupported rope scaling 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "unsupported rope scaling 'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' needs a number 'factor', got None"),
        ({"partial_rotary_factor": 0.5}, "unsupported partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "unsupported quant_method 'fp8'"),
        ({"logits_scaling": 8.0}, r"unsupported feature in config.json: logits_scaling=8\.0"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, got None"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"head_dim": 15}, "head_dim must be even"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config({**LLAMA, **changes})


def test_more_active_experts_than_experts_are_refused() -> None:
    mixtral = {
        **LLAMA,
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 5,
    }
    with pytest.raises(CheckpointError, match="num_experts_per_tok 5 is more than num_local_experts 4"):
        parse_config(mixtral)


def test_an_unknown_layer_type_is_refused() -> None:
    with pytest.raises(CheckpointError, match="unsupported layer type 'chunked_attention'"):
        parse_config({**QWEN2, "layer_types": ["full_attention", "chunked_attention", "full_attention"]})
