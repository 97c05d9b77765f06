"""The models of bench.kv_load: the shipped one, and one whose KV is of a size at which the link matters.

The shipped model has 4 KiB of KV a token, so that what every load costs, whatever its size, is most of it. The large
one has 32, in the same fp32; models of billions of parameters have 64 to 160, in bf16. Its weights are noise and so is
its KV, which says nothing about the sizes that a codec reaches: its profile has bins of which a value takes about as
many bits as the shipped model's. Times at equal bits a value are what it is for.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.model import DEMO_MODEL, write_random_model
from kvstore.codec.profile import load_profile
from tools.demo_corpus import load_documents
from workers.model.checkpoint import PROFILE_FILE, Checkpoint
from workers.model.info import load_model_info

_DTYPE = "float32"
_LARGE_LAYERS = 8
_LARGE_KEY_FACTOR = 0.6
_PROFILE_TOKENS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextModel:
    name: str
    path: Path
    kv_bytes_per_token: int
    bits_per_level: tuple[float, ...]  # of a value, by its profile

    @property
    def title(self) -> str:
        bits = ", ".join(f"{each:.2f}" for each in self.bits_per_level)
        return f"{self.name}: {self.kv_bytes_per_token / 1024:g} KiB of KV a token; CacheGen's bits a value: {bits}"


def shipped_model() -> ContextModel:
    return _described("shipped", DEMO_MODEL)


def large_model(directory: Path) -> ContextModel:
    """A random checkpoint in `directory`, profiled as `penstock profile-kv` does it."""
    write_random_model(directory, hidden_size=512, num_layers=_LARGE_LAYERS, num_kv_heads=8)
    text = directory / "text.txt"
    text.write_text("\n\n".join(load_documents(held_out=False)), encoding="utf-8")
    factors = ",".join([str(_LARGE_KEY_FACTOR)] * _LARGE_LAYERS)
    subprocess.run(
        [
            sys.executable, "-m", "workers.profile_kv", "--model-path", str(directory), "--text", str(text),
            "--dtype", _DTYPE, "--max-tokens", str(_PROFILE_TOKENS), "--key-factors", factors,
        ],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return _described("large", directory)


def _described(name: str, path: Path) -> ContextModel:
    info = load_model_info(path, Checkpoint(path), dtype=_DTYPE, max_model_len=None)
    profile = load_profile(path / PROFILE_FILE, fingerprint=info.fingerprint, layout=info.layout)
    if profile is None:
        raise RuntimeError(f"{path} has no {PROFILE_FILE}")
    return ContextModel(
        name=name,
        path=path,
        kv_bytes_per_token=info.layout.block_bytes // info.layout.block_size_tokens,
        bits_per_level=profile.bits_per_level,
    )
