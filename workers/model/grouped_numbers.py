"""A matrix out of the 32-bit words in which AWQ and GPTQ checkpoints have it: W_nk = (q_nk - zero_nj) scale_nj.

N outputs, K inputs, J groups of inputs with a zero and a scale each. Files have scales [J, N] in floats, and words of 8
numbers of 4 bits or 4 of 8, the first in the lowest bits:

    AWQ    qweight [K, N/8], qzeros [J, N/8]: along outputs, in the order of _AWQ_OUTPUTS
    GPTQ   qweight [K/8, N] along inputs, qzeros [J, N/8] along outputs, g_idx [K] the group of each input

With "act-order" GPTQ's groups are of inputs that matter alike and lie anywhere. Here numbers stand group by group, and
`order_K` says which input each is for.
"""

from dataclasses import dataclass

import torch

from workers.errors import CheckpointError
from workers.model.checkpoint import Checkpoint
from workers.model.stored_quantization import StoredQuantization

# The output of each of a word's numbers, counted from the first output of the word.
_AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_PLACES = [_AWQ_OUTPUTS.index(output) for output in range(8)]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedNumbers:
    bits: int
    numbers_NK: torch.Tensor  # uint8
    zeros_NJ: torch.Tensor  # int16
    scales_NJ: torch.Tensor  # float32
    order_K: torch.Tensor | None  # int64; None: number k is for input k

    def whole(self) -> torch.Tensor:
        """[N, K] in float32, of the inputs in their own order."""
        weight_NJK = self.numbers_NK.view(*self.scales_NJ.shape, -1).float()
        weight_NJK.sub_(self.zeros_NJ.unsqueeze(-1)).mul_(self.scales_NJ.unsqueeze(-1))
        weight_NK = weight_NJK.flatten(1)
        if self.order_K is None:
            return weight_NK
        return torch.empty_like(weight_NK).index_copy_(1, self.order_K, weight_NK)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedMatrix:
    """Where one is: `name`.qweight and what belongs to it."""

    name: str
    num_outputs: int
    num_inputs: int


def read_grouped(
    checkpoint: Checkpoint, matrix: PackedMatrix, stored: StoredQuantization, device: torch.device
) -> GroupedNumbers:
    """Unpacked on `device`. Raises `CheckpointError` for what is missing, of another shape, or cannot be meant."""
    name, num_outputs, num_inputs = matrix.name, matrix.num_outputs, matrix.num_inputs
    group_size, per_word, is_awq = stored.group_size or num_inputs, 32 // stored.bits, stored.method == "awq"
    if num_inputs % group_size or num_outputs % per_word or (not is_awq and num_inputs % per_word):
        raise CheckpointError(
            f"{name}: {num_outputs} outputs of {num_inputs} inputs are not whole words of {per_word} numbers"
            f" and whole groups of {group_size}"
        )
    num_groups = num_inputs // group_size
    shape = (num_inputs, num_outputs // per_word) if is_awq else (num_inputs // per_word, num_outputs)
    words = checkpoint.words(f"{name}.qweight", shape).to(device)
    zero_words = checkpoint.words(f"{name}.qzeros", (num_groups, num_outputs // per_word)).to(device)
    scales_JN = checkpoint.floats(f"{name}.scales", (num_groups, num_outputs)).to(device)
    if is_awq:
        numbers_NK, zeros_NJ, order_K = _awq_outputs(words), _awq_outputs(zero_words), None
    else:
        numbers_NK = _numbers(words, stored.bits).permute(1, 0, 2).flatten(1)
        zeros_NJ = _numbers(zero_words, stored.bits).flatten(1).T
        order_K = _order(checkpoint, name, num_inputs, num_groups)
    if order_K is not None:
        order_K = order_K.to(device)
        numbers_NK = numbers_NK[:, order_K]
    return GroupedNumbers(
        bits=stored.bits, numbers_NK=numbers_NK.contiguous(), zeros_NJ=_zeros(zeros_NJ, name, stored),
        scales_NJ=scales_JN.T.float().contiguous(), order_K=order_K,
    )  # fmt: skip


def _numbers(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., words] -> uint8 [..., words, numbers of a word]."""
    in_bytes = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    if bits == 8:
        return in_bytes
    return torch.stack((in_bytes & 15, in_bytes >> 4), dim=-1).flatten(-2)


def _awq_outputs(words: torch.Tensor) -> torch.Tensor:
    """[X, N/8] -> [N, X]."""
    return _numbers(words, 4)[..., _AWQ_PLACES].flatten(1).T


def _zeros(zeros_NJ: torch.Tensor, name: str, stored: StoredQuantization) -> torch.Tensor:
    if not stored.zeros_are_less_one:
        return zeros_NJ.to(torch.int16)
    top = 2**stored.bits - 1
    if bool((zeros_NJ == top).any()):
        # A zero of 0 was stored as -1. Writers differ in how far it spilt over the word, and readers in what they take
        # it for: 0, 16, or 0 with the next number one higher.
        raise CheckpointError(
            f"{name}.qzeros has a zero of {top}, which format gptq has no meaning for (the zero less one);"
            " save the checkpoint in format gptq_v2, or quantised with sym"
        )
    return zeros_NJ.to(torch.int16) + 1


def _order(checkpoint: Checkpoint, name: str, num_inputs: int, num_groups: int) -> torch.Tensor | None:
    """The inputs, group by group; None where they already are."""
    group_K = checkpoint.words(f"{name}.g_idx", (num_inputs,)).long()
    if int(group_K.min()) < 0 or int(group_K.max()) >= num_groups:
        raise CheckpointError(f"{name}.g_idx has a group that is none of 0 to {num_groups - 1}")
    sizes_J, size = group_K.bincount(minlength=num_groups), num_inputs // num_groups
    if bool((sizes_J != size).any()):
        raise CheckpointError(
            f"{name}.g_idx puts {sizes_J.tolist()} inputs into the groups, and {size} into each would be right"
        )
    return None if bool((group_K.diff() >= 0).all()) else group_K.argsort(stable=True)
