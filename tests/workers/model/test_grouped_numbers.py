"""Words written out by hand, as the formats define them, and the weights that they mean."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workers.model.checkpoint import Checkpoint
from workers.model.grouped_numbers import PackedMatrix, read_grouped
from workers.model.stored_quantization import StoredQuantization


def words(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[word - 2**32 if word >= 2**31 else word for word in row] for row in rows]).int()


def read(
    path: Path,
    tensors: dict[str, torch.Tensor],
    stored: StoredQuantization,
    *,
    num_outputs: int,
    num_inputs: int,
) -> torch.Tensor:
    save_file({f"m.{name}": tensor for name, tensor in tensors.items()}, path / "model.safetensors")
    matrix = PackedMatrix(name="m", num_outputs=num_outputs, num_inputs=num_inputs)
    return read_grouped(Checkpoint(path), matrix, stored, torch.device("cpu")).whole()


def test_awq_interleaves_the_outputs_of_a_word(tmp_path: Path) -> None:
    # From the lowest bits on a word has outputs 0, 2, 4, 6, 1, 3, 5, 7, and there is a word for each input.
    tensors = {
        "qweight": words([[0x75316420], [0x8000000F], [0x00010000], [0x00000000]]),
        "qzeros": words([[0x86427531], [0x00000001]]),  # 1 to 8; then 1 and seven times 0
        "scales": torch.tensor([[1.0] * 8, [0.5] * 7 + [2.0]]).half(),
    }
    stored = StoredQuantization(method="awq", bits=4, group_size=2, zeros_are_less_one=False)
    whole_NK = read(tmp_path, tensors, stored, num_outputs=8, num_inputs=4)
    zeros = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    assert torch.equal(whole_NK[:, 0], torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]) - zeros.float())
    assert torch.equal(whole_NK[:, 1], torch.tensor([15, 0, 0, 0, 0, 0, 0, 8]) - zeros.float())
    assert whole_NK[:, 2].tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert whole_NK[:, 3].tolist() == [-0.5, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("less_one", [True, False])
def test_gptq_has_words_along_the_inputs_and_zeros_along_the_outputs(less_one: bool, tmp_path: Path) -> None:
    tensors = {
        "qweight": words([[0x76543210, 0xFEDCBA98, 0x00000001, 0x10000000, 0, 0, 0, 0]]),
        "qzeros": words([[0x76543210]]),
        "scales": torch.tensor([[1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.25]]).half(),
        "g_idx": torch.zeros(8, dtype=torch.int32),
    }
    stored = StoredQuantization(method="gptq", bits=4, group_size=None, zeros_are_less_one=less_one)
    whole_NK = read(tmp_path, tensors, stored, num_outputs=8, num_inputs=8)
    one = 1 if less_one else 0
    assert whole_NK[0].tolist() == [q - (0 + one) for q in range(8)]
    assert whole_NK[1].tolist() == [2 * (q - (1 + one)) for q in range(8, 16)]
    assert whole_NK[2].tolist() == [1 - (2 + one), *[-(2 + one)] * 7]
    assert whole_NK[3].tolist() == [*[-(3 + one)] * 7, 1 - (3 + one)]
    assert whole_NK[7].tolist() == [-0.25 * (7 + one)] * 8


def test_gptq_of_8_bits_has_four_numbers_in_a_word(tmp_path: Path) -> None:
    tensors = {
        "qweight": words([[0xFF810100, 0x7F7F7F7F, 0, 0]]),
        "qzeros": words([[0xFE007F7E]]),  # 127, 128, 1 and 255
        "scales": torch.ones(1, 4).half(),
        "g_idx": torch.zeros(4, dtype=torch.int32),
    }
    stored = StoredQuantization(method="gptq", bits=8, group_size=4, zeros_are_less_one=True)
    whole_NK = read(tmp_path, tensors, stored, num_outputs=4, num_inputs=4)
    assert whole_NK.tolist() == [[-127, -126, 2, 128], [-1] * 4, [-1] * 4, [-255] * 4]


def test_groups_of_gptq_may_lie_anywhere_among_the_inputs(tmp_path: Path) -> None:
    groups = [1, 0, 0, 1, 1, 0, 0, 1]
    tensors = {
        "qweight": words([[0x76543210] + [0] * 7]),
        "qzeros": words([[0x00000003], [0x00000005]]),
        "scales": torch.tensor([[1.0] * 8, [10.0] * 8]).half(),
        "g_idx": torch.tensor(groups, dtype=torch.int32),
    }
    stored = StoredQuantization(method="gptq", bits=4, group_size=4, zeros_are_less_one=False)
    whole_NK = read(tmp_path, tensors, stored, num_outputs=8, num_inputs=8)
    expected = [(q - (3, 5)[group]) * (1, 10)[group] for q, group in enumerate(groups)]
    assert whole_NK[0].tolist() == expected
