"""What a config.json says of matrices that AWQ or GPTQ quantised: how they are packed.

Which matrices are, it says too, in several ways (`modules_to_not_convert`, `modules_in_block_to_quantize`, `lm_head`,
`dynamic`). That is not read: the checkpoint's tensors show it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from workers.errors import CheckpointError

_FORMATS = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}  # the first where none is named
_BITS = {"awq": (4,), "gptq": (4, 8)}
# What changes the numbers, with the values that do not; the first is the usual one. Nothing of it need be named.
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "is_marlin_format": (False, None), "pack_dtype": ("int32", "torch.int32", None), "adapter": (None, {}),
    "rotation": (None, ""),
}  # fmt: skip
_SUPPORTED_OF = {"awq": {"zero_point": (True,)}, "gptq": {}}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredQuantization:
    method: Literal["awq", "gptq"]
    bits: int
    group_size: int | None  # of inputs; None: all inputs of a layer are one group
    zeros_are_less_one: bool  # a stored 7 means 8: GPTQ's first format


def parse_stored_quantization(raw: Mapping[str, Any]) -> StoredQuantization | None:
    """None for a checkpoint of whole weights. Raises `CheckpointError` for what would be computed wrongly."""
    given = raw.get("quantization_config")
    if not given:
        return None
    if not isinstance(given, dict):
        raise CheckpointError(f"config.json: quantization_config must be an object, got {given!r}")
    method = given.get("quant_method")
    if method not in tuple(_FORMATS):  # compared, not hashed: it may be anything that JSON has
        raise CheckpointError(
            f"unsupported quant_method {method!r} in config.json; supported: awq, gptq, and whole weights"
        )
    _refuse(given)
    if given.get("lm_head") and raw.get("tie_word_embeddings"):
        raise CheckpointError(
            "config.json: lm_head is quantised, and with tie_word_embeddings it is the embedding, which is not;"
            " supported: one of them"
        )
    return StoredQuantization(
        method=method,
        bits=_one_of(given, "bits", _BITS[method]),
        group_size=_group_size(given),
        zeros_are_less_one=_format(given, method) == "gptq",
    )


def _refuse(given: Mapping[str, Any]) -> None:
    for name, supported in (_SUPPORTED | _SUPPORTED_OF[given["quant_method"]]).items():
        if name in given and given[name] not in supported:
            raise CheckpointError(
                f"unsupported {name} {given[name]!r} in quantization_config; supported: {supported[0]!r}"
            )
    dynamic = given.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise CheckpointError(f"quantization_config: dynamic must be an object, got {dynamic!r}")
    for pattern, changes in dynamic.items():
        if changes and not pattern.startswith("-:"):
            raise CheckpointError(
                f"unsupported dynamic {pattern!r} in quantization_config: {changes!r}; supported: layers left"
                " whole ('-:...'), all others alike"
            )


def _format(given: Mapping[str, Any], method: str) -> str:
    """Its key was renamed more than once, and files have two at a time."""
    named = {str(given[key]).lower() for key in ("version", "format", "checkpoint_format") if given.get(key)}
    supported = _FORMATS[method]
    if given.get("backend") == "llm-awq":
        named.add("llm-awq")
    if len(named) > 1 or not named <= set(supported):
        raise CheckpointError(
            f"unsupported format {', '.join(sorted(named))} of {method} in quantization_config; supported: one of"
            f" {', '.join(supported)}"
        )
    return named.pop() if named else supported[0]


def _one_of(given: Mapping[str, Any], name: str, supported: tuple[int, ...]) -> int:
    value = given.get(name)
    if value not in supported:
        raise CheckpointError(
            f"unsupported {name} {value!r} of {given['quant_method']} in quantization_config; supported:"
            f" {', '.join(map(str, supported))}"
        )
    return supported[supported.index(value)]


def _group_size(given: Mapping[str, Any]) -> int | None:
    value = given.get("group_size")
    if not isinstance(value, int) or isinstance(value, bool) or not (value == -1 or value >= 1):
        raise CheckpointError(
            f"quantization_config: group_size must be a number of inputs, or -1 for all, got {value!r}"
        )
    return None if value == -1 else value
