"""Broken checkpoints: each is refused with the file, the tensor, what was expected and what was found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from workers.errors import CheckpointError
from workers.model.checkpoint import Checkpoint
from workers.model.config import load_config
from workers.model.weights import load_weights

NORM = "model.layers.1.input_layernorm.weight"


def load(path: Path) -> None:
    load_weights(Checkpoint(path), load_config(path), dtype=torch.float32)


@pytest.fixture
def copy(checkpoint_of: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> Path:
    """A Llama in one file, to be broken."""
    oracle, _ = checkpoint_of("llama")
    oracle.save_pretrained(tmp_path)
    return tmp_path


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def test_a_missing_tensor_is_named(copy: Path) -> None:
    change(copy, lambda tensors: tensors.__delitem__(NORM))
    with pytest.raises(
        CheckpointError, match=rf"{NORM} is missing from model\.safetensors; expected shape \[48\]"
    ):
        load(copy)


def test_a_tensor_of_another_shape_is_named(copy: Path) -> None:
    change(copy, lambda tensors: tensors.update({NORM: torch.ones(47)}))
    with pytest.raises(
        CheckpointError, match=rf"safetensors: tensor {NORM} has shape \[47\], expected \[48\]"
    ):
        load(copy)


def test_a_tensor_that_is_not_a_float_is_named(copy: Path) -> None:
    change(copy, lambda tensors: tensors.update({NORM: torch.ones(48, dtype=torch.int64)}))
    with pytest.raises(CheckpointError, match=rf"tensor {NORM} has dtype I64; supported: BF16, F16, F32"):
        load(copy)


def test_a_missing_output_matrix_is_not_taken_for_tied(copy: Path) -> None:
    change(copy, lambda tensors: tensors.__delitem__("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        load(copy)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(copy: Path, share: float) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file"):
        load(copy)


def test_bytes_that_are_not_safetensors_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"PK\x03\x04 something else entirely" * 100)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load(copy)


def test_a_directory_without_safetensors_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        load(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    index = {"weight_map": {NORM: "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"files that do not exist: model-00001-of-00002\.safetensors"):
        load(copy)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": '])
def test_a_broken_index_is_named(copy: Path, content: str) -> None:
    (copy / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json is not an index"):
        load(copy)


def test_bfloat16_files_load_exactly_into_float32(copy: Path) -> None:
    change(
        copy, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})
    )
    weights = load_weights(Checkpoint(copy), load_config(copy), dtype=torch.float32)
    expected = load_file(copy / "model.safetensors")["model.norm.weight"].float()
    assert torch.equal(weights.final_norm_D, expected)
