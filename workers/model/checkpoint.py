"""The safetensors files of a model, opened lazily; what is missing, truncated or of another shape is named."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from workers.errors import CheckpointError
from workers.model.tensor_file import SUPPORTED, Entry, IncompleteFile, TensorFile

PROFILE_FILE = "kv_profile.safetensors"  # beside the weights, of the KV that they compute; it is none of them
_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """The safetensors files of a directory. Tensors are read when asked for. Raises `CheckpointError`."""

    def __init__(self, model_path: Path) -> None:
        self.files = _weight_files(model_path)
        self._opened = {file: _open(file) for file in self.files}
        self._file_of = {name: file for file, opened in self._opened.items() for name in opened.entries}

    def copy_into(self, target: torch.Tensor, name: str) -> None:
        """Copies tensor `name`, which must have the shape of `target`, converting its dtype."""
        target.copy_(self.floats(name, target.shape))

    def floats(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """A view of the file, of any of the dtypes of floats."""
        file, entry = self._find(name, list(shape))
        if not entry.is_float:
            raise CheckpointError(f"{file}: tensor {name} has dtype {entry.dtype}; supported: {SUPPORTED}")
        return self._opened[file].tensor(name)

    def words(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """A view of the file, int32."""
        file, entry = self._find(name, list(shape))
        if entry.dtype != "I32":
            raise CheckpointError(f"{file}: tensor {name} has dtype {entry.dtype}, expected I32")
        return self._opened[file].tensor(name)

    def _find(self, name: str, shape: list[int]) -> tuple[Path, Entry]:
        file = self._file_of.get(name)
        if file is None:
            where = ", ".join(file.name for file in self.files)
            raise CheckpointError(f"tensor {name} is missing from {where}; expected shape {shape}")
        entry = self._opened[file].entries[name]
        if entry.shape != shape:
            raise CheckpointError(f"{file}: tensor {name} has shape {entry.shape}, expected {shape}")
        return file, entry

    def has(self, name: str) -> bool:
        return name in self._file_of

    def digest(self) -> bytes:
        """32 bytes over the content of all files."""
        total = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
        return total.digest()


def _weight_files(model_path: Path) -> list[Path]:
    index = model_path / _INDEX
    if not index.exists():
        files = sorted(file for file in model_path.glob("*.safetensors") if file.name != PROFILE_FILE)
        if not files:
            raise CheckpointError(
                f"{model_path} holds no *.safetensors file; other formats are not supported"
            )
        return files
    try:
        files = [
            model_path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{index} is not an index of safetensors files: {e!r}") from e
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(f"{index} names files that do not exist: {', '.join(missing)}")
    return files


def _open(file: Path) -> TensorFile:
    try:
        return TensorFile(file)
    except (IncompleteFile, OSError) as e:
        raise CheckpointError(f"{file} is not a complete safetensors file: {e}") from e
