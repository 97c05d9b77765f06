"""A safetensors file, mapped into memory: 8 bytes that say how long the header is, the header in JSON, the tensors.

Read by ourselves, because a bare GPU machine has no safetensors and the format is no more than this.
"""

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import torch

_MAX_HEADER_BYTES = 100 << 20  # as the format's own library has it
_LENGTH_BYTES = 8
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPES = _FLOATS | {"I32": torch.int32}
_ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
SUPPORTED = ", ".join(sorted(_FLOATS))


class IncompleteFile(ValueError):
    """The bytes are not a whole safetensors file; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What the header says of a tensor. Bytes count from the start of the file."""

    dtype: str
    shape: list[int]
    start: int
    stop: int

    @property
    def is_float(self) -> bool:
        return self.dtype in _FLOATS


class TensorFile:
    """Tensors are views of the file, read when they are looked at. Raises `IncompleteFile` and `OSError`."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            try:
                # Private: torch wants memory that it may write to, and nothing written ends up in the file.
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except ValueError as e:
                raise IncompleteFile("it is empty") from e
        self.entries = _entries(self._memory)

    def tensor(self, name: str) -> torch.Tensor:
        """Of floats, or int32."""
        entry = self.entries[name]
        values = torch.frombuffer(
            self._memory, dtype=_DTYPES[entry.dtype], count=math.prod(entry.shape), offset=entry.start
        )
        return values.view(entry.shape)


def _entries(memory: mmap.mmap) -> dict[str, Entry]:
    header_bytes = int.from_bytes(memory[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + header_bytes
    if header_bytes > _MAX_HEADER_BYTES or start > len(memory):
        raise IncompleteFile(f"a header of {header_bytes} bytes in a file of {len(memory)}")
    try:
        header = json.loads(memory[_LENGTH_BYTES:start])
        header.pop("__metadata__", None)
        entries = {name: _entry(raw, start) for name, raw in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise IncompleteFile(f"its header is not one: {e!r}") from e
    for name, entry in entries.items():
        if not start <= entry.start <= entry.stop <= len(memory):
            raise IncompleteFile(f"tensor {name} ends at byte {entry.stop} of {len(memory)}")
        size, item_bytes = entry.stop - entry.start, _ITEM_BYTES.get(entry.dtype)
        if item_bytes is not None and size != item_bytes * math.prod(entry.shape):
            raise IncompleteFile(f"tensor {name} of {entry.dtype} {entry.shape} has {size} bytes")
    return entries


def _entry(raw: dict[str, object], start: int) -> Entry:
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError(f"a tensor needs a dtype, a shape and two offsets, got {raw}")
    first, last = (int(offset) for offset in offsets)
    if any(not isinstance(size, int) or size < 0 for size in shape):
        raise ValueError(f"a shape is of whole numbers, got {shape}")
    return Entry(dtype=dtype, shape=shape, start=start + first, stop=start + last)
