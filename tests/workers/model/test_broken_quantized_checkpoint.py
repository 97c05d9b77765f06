"""Packed checkpoints whose tensors do not fit each other or their config: refused by what is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers.model.packed_models import PACKINGS, change, edit_config, load, make
from workers.errors import CheckpointError

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("attention", ["reference", "numba"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{Q}.qzeros"), rf"tensor {Q}\.qzeros is missing"),
        (lambda t: t.pop(f"{Q}.scales"), rf"tensor {Q}\.scales is missing .*shape \[1, 128\]"),
        (lambda t: t.pop(f"{Q}.g_idx"), rf"tensor {Q}\.g_idx is missing"),
        (lambda t: t.pop(f"{Q}.qweight"), rf"tensor {Q}\.weight is missing"),
        (
            lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:-1]}),
            rf"{Q}\.qweight has shape \[15, 128\], expected \[16, 128\]",
        ),
        (
            lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].repeat(2, 1)}),
            rf"{Q}\.scales has shape \[2, 128\], expected \[1, 128\]",
        ),
        (
            lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].long()}),
            rf"{Q}\.qweight has dtype I64, expected I32",
        ),
        (
            lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].int()}),
            rf"{Q}\.scales has dtype I32; supported: BF16, F16, F32",
        ),
        (lambda t: t[f"{Q}.qzeros"].fill_(-1), rf"{Q}\.qzeros has a zero of 15.*save .* gptq_v2"),
        (lambda t: t[f"{Q}.g_idx"].fill_(1), rf"{Q}\.g_idx has a group that is none of 0 to 0"),
        (
            lambda t: t["model.layers.0.mlp.down_proj.g_idx"].fill_(1),
            r"down_proj\.g_idx puts \[0, 256\] inputs into the groups, and 128 into each",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    edit: Callable[[dict[str, torch.Tensor]], None], message: str, attention: str, tmp_path: Path
) -> None:
    make(tmp_path, "llama_bias", PACKINGS["gptq"])
    change(tmp_path, edit)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, attention=attention)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"group_size": 96},
            "128 outputs of 128 inputs are not whole words of 8 numbers and whole groups of 96",
        ),
        ({"group_size": 64}, r"qzeros has shape \[1, 16\], expected \[2, 16\]"),
        ({"bits": 8}, r"qweight has shape \[16, 128\], expected \[32, 128\]"),
        ({"quant_method": "awq", "checkpoint_format": "gemm"}, r"shape \[16, 128\], expected \[128, 16\]"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make(tmp_path, "llama_bias", PACKINGS["gptq"])
    edit_config(tmp_path, quantization_config=PACKINGS["gptq"].config() | changes)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    make(tmp_path, "llama_bias", PACKINGS["awq"])
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file"):
        load(tmp_path)
