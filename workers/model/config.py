"""What a Hugging Face config.json says about a model. Anything that we would compute wrongly is an error here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workers.errors import CheckpointError
from workers.model.rope import Rope, parse_rope
from workers.model.stored_quantization import StoredQuantization, parse_stored_quantization

RawConfig = Mapping[str, Any]
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
# Features that change results and that no model we serve has. A checkpoint that sets one would be served wrongly.
_UNSUPPORTED = (
    "attn_logit_softcapping", "final_logit_softcapping", "dual_chunk_attention_config", "residual_multiplier",
    "embedding_multiplier", "logits_scaling", "attention_multiplier", "shared_expert_intermediate_size",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """A mixture-of-experts MLP: the softmax over all experts picks `num_active`."""

    num_experts: int
    num_active: int
    intermediate_size: int
    normalizes: bool  # the weights of the picked experts are rescaled to sum to one
    naming: Literal["mixtral", "qwen"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerConfig:
    """What may differ between layers: an attention window in tokens, and experts or a dense MLP."""

    window: int | None
    moe: MoeConfig | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything that the answers depend on, and nothing else."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    rope: Rope
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    layers: tuple[LayerConfig, ...]


def load_config(model_path: Path) -> ModelConfig:
    """The model described by `model_path`/config.json. Raises `CheckpointError`."""
    return parse_config(_read_json(model_path / "config.json"))


def load_stored_quantization(model_path: Path) -> StoredQuantization | None:
    """How the checkpoint's matrices are packed; None: they are whole. Raises `CheckpointError`."""
    return parse_stored_quantization(_read_json(model_path / "config.json"))


def load_eos_token_ids(model_path: Path) -> frozenset[int]:
    """The ids that end a text: generation_config.json's if it names any, else config.json's, else none."""
    for name in ("generation_config.json", "config.json"):
        path = model_path / name
        eos = _read_json(path).get("eos_token_id") if path.exists() else None
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()


def parse_config(raw: RawConfig) -> ModelConfig:
    """The checked meaning of a config.json. Raises `CheckpointError` naming what is missing or unsupported."""
    architecture = _architecture(raw)
    _refuse_unsupported(raw)
    num_heads, hidden_size = _positive(raw, "num_attention_heads"), _positive(raw, "hidden_size")
    num_kv_heads = _positive(raw, "num_key_value_heads", default=num_heads)
    head_dim = _positive(raw, "head_dim", default=max(1, hidden_size // num_heads))
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    if head_dim % 2:
        raise CheckpointError(f"head_dim must be even for rotary embeddings, got {head_dim}")
    attention_bias = bool(raw.get("attention_bias", False)) and architecture in (
        "llama",
        "qwen3",
        "qwen3_moe",
    )
    max_positions = _positive(raw, "max_position_embeddings", default=2048)
    return ModelConfig(
        architecture=architecture,
        vocab_size=_positive(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(raw, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_positions=max_positions,
        rope=parse_rope(raw, max_positions=max_positions),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or architecture == "qwen2",
        output_bias=attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)) and architecture == "llama",
        qk_norm=architecture in ("qwen3", "qwen3_moe"),
        layers=_layers(raw, architecture),
    )


def _read_json(path: Path) -> RawConfig:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as e:
        raise CheckpointError(
            f"{path} does not exist: a checkpoint is a directory with config.json and *.safetensors"
        ) from e
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{path} is not readable JSON: {e}") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _architecture(raw: RawConfig) -> str:
    names = raw.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise CheckpointError(
        f"unsupported architecture {', '.join(names) or 'none named'}; supported: {', '.join(ARCHITECTURES)}"
    )


def _refuse_unsupported(raw: RawConfig) -> None:
    parse_stored_quantization(raw)
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"unsupported hidden_act {activation!r}; supported: silu")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            f"unsupported partial_rotary_factor {raw['partial_rotary_factor']}; supported: 1.0"
        )
    for name in _UNSUPPORTED:
        if raw.get(name):
            raise CheckpointError(f"unsupported feature in config.json: {name}={raw[name]!r}")


def _positive(raw: RawConfig, name: str, *, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {name} must be a positive integer, got {value!r}")
    return value


def _layers(raw: RawConfig, architecture: str) -> tuple[LayerConfig, ...]:
    num_layers = _positive(raw, "num_hidden_layers")
    windows, moe = _windows(raw, architecture, num_layers), _moe(raw, architecture)
    sparse_step = raw.get("decoder_sparse_step", 1)
    dense = set(raw.get("mlp_only_layers") or ())

    def experts_of(layer: int) -> MoeConfig | None:
        if architecture != "qwen3_moe":
            return moe
        return moe if layer not in dense and sparse_step > 0 and (layer + 1) % sparse_step == 0 else None

    return tuple(LayerConfig(window=windows[layer], moe=experts_of(layer)) for layer in range(num_layers))


def _windows(raw: RawConfig, architecture: str, num_layers: int) -> list[int | None]:
    """The sliding window of each layer; None attends to everything before it."""
    window = raw.get("sliding_window")
    if architecture == "llama" or (
        architecture.startswith("qwen") and not raw.get("use_sliding_window", False)
    ):
        window = None
    if window is not None and (not isinstance(window, int) or window < 1):
        raise CheckpointError(f"config.json: sliding_window must be a positive integer, got {window!r}")
    if architecture not in ("qwen2", "qwen3"):
        return [window] * num_layers
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28)
        return [window if layer >= first else None for layer in range(num_layers)]
    if len(types) != num_layers:
        raise CheckpointError(f"config.json: layer_types has {len(types)} entries for {num_layers} layers")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise CheckpointError(
                f"unsupported layer type {name!r}; supported: full_attention, sliding_attention"
            )
    return [window if name == "sliding_attention" else None for name in types]


def _moe(raw: RawConfig, architecture: str) -> MoeConfig | None:
    match architecture:
        case "mixtral":
            width, normalizes = _positive(raw, "intermediate_size"), True
        case "qwen3_moe":
            width, normalizes = (
                _positive(raw, "moe_intermediate_size"),
                bool(raw.get("norm_topk_prob", False)),
            )
        case _:
            return None
    count_name = "num_local_experts" if raw.get("num_local_experts") is not None else "num_experts"
    num_experts, num_active = _positive(raw, count_name), _positive(raw, "num_experts_per_tok")
    if num_active > num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok {num_active} is more than {count_name} {num_experts}"
        )
    return MoeConfig(
        num_experts=num_experts,
        num_active=num_active,
        intermediate_size=width,
        normalizes=normalizes,
        naming="mixtral" if architecture == "mixtral" else "qwen",
    )
