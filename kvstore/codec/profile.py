"""What was learnt of a model's KV beforehand, and is therefore not sent with every chunk."""

from dataclasses import dataclass
from pathlib import Path

from kvstore.layout import KvLayout

PROFILE_FILE = "kv_profile.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class KvProfile:
    """Of one model and layout. `digest` (16 bytes) stands for all of it: chunks name the profile they need."""

    fingerprint: bytes
    layout: KvLayout
    digest: bytes
    bits_per_level: tuple[float, ...]


def load_profile(path: Path, *, fingerprint: bytes, layout: KvLayout) -> KvProfile | None:
    """None if there is no such file; ProfileMismatch if it is another model's or of another version."""
    return None
