"""What a quantization_config may say, as the tools that write it have it, and what is refused by its value."""

from typing import Any

import pytest

from workers.errors import CheckpointError
from workers.model.stored_quantization import StoredQuantization, parse_stored_quantization

AWQ: dict[str, Any] = {
    "quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": ["gate"], "backend": "autoawq",
}  # fmt: skip
GPTQ: dict[str, Any] = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False, "damp_percent": 0.01,
    "true_sequential": True, "static_groups": False, "lm_head": False,
}  # fmt: skip


def parse(**given: Any) -> StoredQuantization | None:
    return parse_stored_quantization({"quantization_config": given})


@pytest.mark.parametrize("raw", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_a_config_that_says_nothing_has_whole_weights(raw: dict[str, Any]) -> None:
    assert parse_stored_quantization(raw) is None


def test_awq_stores_its_zeros_as_they_are() -> None:
    expected = StoredQuantization(method="awq", bits=4, group_size=128, zeros_are_less_one=False)
    assert parse(**AWQ) == expected
    assert parse(**AWQ | {"version": "GEMM"}) == expected
    assert parse(**AWQ | {"version": None, "format": "gemm", "checkpoint_format": "gemm"}) == expected


def test_gptq_stores_its_zeros_less_one_but_in_its_second_format() -> None:
    expected = StoredQuantization(method="gptq", bits=4, group_size=128, zeros_are_less_one=True)
    assert parse(**GPTQ) == expected
    assert parse(**GPTQ | {"checkpoint_format": "gptq", "pack_dtype": "int32", "adapter": None}) == expected
    v2 = parse(**GPTQ | {"checkpoint_format": "gptq_v2", "format": "gptq_v2"})
    assert v2 == StoredQuantization(method="gptq", bits=4, group_size=128, zeros_are_less_one=False)


def test_all_inputs_may_be_one_group_and_a_number_may_have_a_byte() -> None:
    stored = parse(**GPTQ | {"group_size": -1, "bits": 8})
    assert stored == StoredQuantization(method="gptq", bits=8, group_size=None, zeros_are_less_one=True)


def test_layers_may_be_left_whole_by_rule() -> None:
    assert parse(**GPTQ | {"dynamic": {"-:.*down.*": {}}}) == parse(**GPTQ)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("int4", "quantization_config must be an object, got 'int4'"),
        (
            {"bits": 4},
            "unsupported quant_method None in config.json; supported: awq, gptq, and whole weights",
        ),
        ({"quant_method": "bitsandbytes"}, "unsupported quant_method 'bitsandbytes'"),
        ({"quant_method": ["awq"]}, r"unsupported quant_method \['awq'\]"),
        (AWQ | {"bits": 3}, "unsupported bits 3 of awq in quantization_config; supported: 4"),
        (AWQ | {"version": "gemv"}, "unsupported format gemv of awq .*; supported: one of gemm"),
        (AWQ | {"backend": "llm-awq"}, "unsupported format gemm, llm-awq of awq"),
        (AWQ | {"zero_point": False}, "unsupported zero_point False in quantization_config; supported: True"),
        (GPTQ | {"bits": 3}, "unsupported bits 3 of gptq in quantization_config; supported: 4, 8"),
        (GPTQ | {"bits": None}, "unsupported bits None of gptq"),
        (
            GPTQ | {"checkpoint_format": "marlin"},
            "unsupported format marlin of gptq .*: one of gptq, gptq_v2",
        ),
        (
            GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"},
            "unsupported format gptq, gptq_v2 of gptq",
        ),
        (GPTQ | {"is_marlin_format": True}, "unsupported is_marlin_format True .*; supported: False"),
        (GPTQ | {"pack_dtype": "int16"}, "unsupported pack_dtype 'int16' .*; supported: 'int32'"),
        (GPTQ | {"adapter": {"rank": 8}}, "unsupported adapter {'rank': 8} .*; supported: None"),
        (GPTQ | {"rotation": "hadamard"}, "unsupported rotation 'hadamard'"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, r"unsupported dynamic .* {'bits': 8}; .* alike"),
        (GPTQ | {"dynamic": ["-:.*down.*"]}, r"dynamic must be an object, got \['-:"),
        (GPTQ | {"group_size": 0}, "group_size must be a number of inputs, or -1 for all, got 0"),
        (GPTQ | {"group_size": "128"}, "group_size must be .*, got '128'"),
        (
            {key: value for key, value in AWQ.items() if key != "group_size"},
            "group_size must be .*, got None",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(given: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_stored_quantization({"quantization_config": given})


def test_an_output_matrix_that_is_quantised_is_not_the_embedding() -> None:
    with pytest.raises(CheckpointError, match="lm_head is quantised, and with tie_word_embeddings"):
        parse_stored_quantization(
            {"tie_word_embeddings": True, "quantization_config": GPTQ | {"lm_head": True}}
        )
