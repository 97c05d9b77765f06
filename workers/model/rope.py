"""Rotary position frequencies: plain, and stretched to longer texts by the linear, llama3 and yarn rules.

C is the head dimension; a frequency belongs to a pair of channels, so there are C/2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from workers.errors import CheckpointError

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """A scaling rule and its numbers, defaults filled in. Fields that a rule does not use keep their defaults."""

    kind: str
    theta: float
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


def parse_rope(raw: Mapping[str, Any], *, max_positions: int) -> Rope:
    """The rope of a config.json, in the old spelling (rope_theta, rope_scaling) or the new (rope_parameters)."""
    scaling: Mapping[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in _REQUIRED:
        raise CheckpointError(f"unsupported rope scaling {kind!r}; supported: {', '.join(_REQUIRED)}")
    for name in _REQUIRED[kind]:
        if not isinstance(scaling.get(name), int | float):
            raise CheckpointError(
                f"config.json: rope scaling {kind!r} needs a number {name!r}, got {scaling.get(name)!r}"
            )
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            f"unsupported partial_rotary_factor {scaling['partial_rotary_factor']}; supported: 1.0"
        )
    default_theta = 1_000_000.0 if raw.get("model_type") == "mixtral" else 10_000.0
    factor = float(scaling.get("factor") or 1.0)
    return Rope(
        kind=kind,
        theta=float(scaling.get("rope_theta") or raw.get("rope_theta") or default_theta),
        factor=factor,
        original_max_positions=int(scaling.get("original_max_position_embeddings") or max_positions),
        low_freq_factor=float(scaling.get("low_freq_factor") or 1.0),
        high_freq_factor=float(scaling.get("high_freq_factor") or 4.0),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        attention_factor=_yarn_attention_factor(scaling, factor) if kind == "yarn" else 1.0,
        truncate=bool(scaling.get("truncate", True)),
    )


def cos_sin_tables(rope: Rope, *, head_dim: int, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [num_positions, C/2], fp32, of position times frequency, times the rule's attention factor."""
    angles = torch.outer(
        torch.arange(num_positions, dtype=torch.float32), frequencies(rope, head_dim=head_dim)
    )
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def frequencies(rope: Rope, *, head_dim: int) -> torch.Tensor:
    """Radians per position [C/2], fp32."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    match rope.kind:
        case "linear":
            return plain / rope.factor
        case "llama3":
            return _llama3(plain, rope)
        case "yarn":
            return _yarn(plain, rope, head_dim=head_dim)
        case _:
            return plain


def _llama3(plain: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Long wavelengths are stretched, short ones kept, those between blended (Llama 3.1's rule)."""
    turns = rope.original_max_positions * plain / (2 * math.pi)  # within the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * plain / rope.factor + keep * plain


def _yarn(plain: torch.Tensor, rope: Rope, *, head_dim: int) -> torch.Tensor:
    """Stretch by a ramp over the channels (Peng et al., 2023, "YaRN", section 3.2)."""

    def channel_of(num_turns: float) -> float:
        ratio = rope.original_max_positions / (num_turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = channel_of(rope.beta_fast), channel_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = high - low if high != low else 0.001
    stretch = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0.0, 1.0)
    return plain / rope.factor * stretch + plain * (1 - stretch)


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return temperature(float(mscale)) / temperature(float(mscale_all_dim))
    return temperature(1.0)
