"""What others must know of a model, found without loading its weights."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from kvstore.layout import KvLayout
from workers.model.checkpoint import Checkpoint
from workers.model.config import ModelConfig, load_config, load_eos_token_ids
from workers.quantization import KV_DTYPES, check_quantization


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """Equal fingerprints promise equal KV for equal tokens."""

    fingerprint: bytes
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    dtype: str  # of weights and activations
    layout: KvLayout


def load_model_info(
    model_path: Path,
    checkpoint: Checkpoint,
    *,
    dtype: str,
    quantize: str = "none",
    kv_dtype: str = "auto",
    max_model_len: int | None,
) -> ModelInfo:
    """Reads the config and hashes the weights. Raises `CheckpointError`, or `ValueError` for the settings."""
    check_quantization(quantize, dtype=dtype)
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
    config = load_config(model_path)
    length = checked_length(config, max_model_len)  # before all weights are read
    return ModelInfo(
        fingerprint=_fingerprint(config, checkpoint, dtype=dtype, quantize=quantize, kv_dtype=kv_dtype),
        vocab_size=config.vocab_size,
        max_model_len=length,
        eos_token_ids=load_eos_token_ids(model_path),
        dtype=dtype,
        layout=kv_layout(config, dtype=dtype if kv_dtype == "auto" else kv_dtype),
    )


def checked_length(config: ModelConfig, max_model_len: int | None) -> int:
    """The longest request, the model's own bound by default. Raises `ValueError`."""
    length = config.max_positions if max_model_len is None else max_model_len
    if not 1 <= length <= config.max_positions:
        raise ValueError(
            f"max_model_len must be between 1 and the model's {config.max_positions}, got {length}"
        )
    return length


def kv_layout(config: ModelConfig, *, dtype: str) -> KvLayout:
    """The KV of a model in pages of `dtype`."""
    return KvLayout(
        num_layers=len(config.layers), num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, dtype=dtype
    )


def _fingerprint(
    config: ModelConfig, checkpoint: Checkpoint, *, dtype: str, quantize: str, kv_dtype: str
) -> bytes:
    """32 bytes over all that KV depends on: the meaning of the config, every weight, and what they are computed in."""
    digest = hashlib.sha256(b"penstock-model-1")
    # What is not quantized has no part for it, so that profiles and disk tiers from before there was one hold.
    quantized = [] if quantize == "none" else [quantize.encode()]
    if kv_dtype != "auto":
        quantized.append(f"KV in {kv_dtype}".encode())  # in words, as weights have kinds of the same names
    for part in (repr(config).encode(), dtype.encode(), checkpoint.digest(), *quantized):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
