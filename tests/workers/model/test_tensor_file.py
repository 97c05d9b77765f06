"""Files written by the format's own library, and what no file may say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workers.model.tensor_file import IncompleteFile, TensorFile


def write(path: Path, header: dict[str, object], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_those_that_the_library_wrote(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        str(shape): torch.randn(shape, generator=generator).to(dtype)
        for shape in [(), (1,), (3, 5), (2, 1, 7)]
    }
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "x")
    assert file.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(file.tensor(name), tensor)


def test_writing_to_a_tensor_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "x")
    TensorFile(tmp_path / "x").tensor("a").zero_()
    assert torch.equal(TensorFile(tmp_path / "x").tensor("a"), torch.ones(4))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}, "ends at byte"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "ends at byte"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}, "ends at byte"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, r"a of F32 \[3\] has 8 bytes"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "whole numbers"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, "needs a dtype, a shape"),
        ({"dtype": "F32", "shape": [2]}, "data_offsets"),
        ([], "header is not one"),
    ],
)
def test_a_header_that_does_not_fit_its_data_is_refused(entry: object, message: str, tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": entry}, bytes(8))
    with pytest.raises(IncompleteFile, match=message):
        TensorFile(tmp_path / "x")


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(IncompleteFile, match="a header of 1099511627776 bytes in a file of 10"):
        TensorFile(tmp_path / "x")
