"""Checkpoints in the layouts of AWQ and GPTQ against transformers with the weights that their numbers stand for."""

from pathlib import Path

import pytest
import torch

from kernels.gpu.quantized_weight import QuantizedWeight
from kernels.int8_linear import Int8Weights
from tests.packed_checkpoints import Packing
from tests.workers.model.packed_models import (
    MOE,
    PACKINGS,
    TOKENS,
    assert_logits_are_the_oracles,
    change,
    edit_config,
    experts,
    load,
    logits,
    make,
    products,
)
from workers.compute_device import ComputeDevice
from workers.engine.offline_engine import build_engine
from workers.engine.offline_settings import OfflineSettings
from workers.model.config import load_config
from workers.model.info import load_model_info
from workers.model.quantized_checkpoint import open_checkpoint
from workers.model.weights import load_weights
from workers.request import SamplingParams

EXPERTS = ("_proj.weight", "w1.weight", "w2.weight", "w3.weight")


@pytest.mark.parametrize("name", sorted(PACKINGS))
def test_logits_are_those_of_the_weights_that_the_numbers_stand_for(name: str, tmp_path: Path) -> None:
    oracle = make(tmp_path, "llama_bias", PACKINGS[name])
    model = load(tmp_path)
    assert all(isinstance(weight, QuantizedWeight) for weight in products(model))
    assert_logits_are_the_oracles(model, oracle)
    assert_logits_are_the_oracles(load(tmp_path, attention="numba"), oracle, attention="numba")


@pytest.mark.parametrize("name", ["awq", "gptq_acts_in_order"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3_tied"])
def test_every_dense_family_is_computed(family: str, name: str, tmp_path: Path) -> None:
    oracle = make(tmp_path, family, PACKINGS[name])
    assert_logits_are_the_oracles(load(tmp_path), oracle)
    assert_logits_are_the_oracles(load(tmp_path, attention="numba"), oracle, attention="numba")


@pytest.mark.parametrize("name", ["awq", "gptq_acts_in_order", "gptq_8_bits_acts_in_order"])
@pytest.mark.parametrize("family", sorted(MOE))
def test_experts_are_multiplied_as_stored_and_whole_on_the_cpu(
    family: str, name: str, tmp_path: Path
) -> None:
    oracle = make(tmp_path, family, PACKINGS[name], wanted=EXPERTS)
    model = load(tmp_path)
    assert all(isinstance(weight, QuantizedWeight) for weight in experts(model))
    assert_logits_are_the_oracles(model, oracle)
    assert_logits_are_the_oracles(load(tmp_path, attention="numba"), oracle, attention="numba")


def test_experts_may_be_quantised_anew(tmp_path: Path) -> None:
    oracle = make(tmp_path, "qwen3_moe", PACKINGS["awq"], wanted=EXPERTS)
    with torch.no_grad():
        expected = oracle(torch.tensor([TOKENS])).logits[0, -1]
    anew = load(tmp_path, quantize="w8a16")
    assert all(weight.numbers_NK.dtype == torch.int8 for weight in experts(anew))
    assert (logits(anew, TOKENS) - expected).norm() < 0.05 * expected.norm()


def test_experts_of_which_one_was_left_whole_become_whole(tmp_path: Path) -> None:
    oracle = make(tmp_path, "mixtral", PACKINGS["gptq"], wanted=("experts.1.w1.weight", "w2.weight"))
    model = load(tmp_path)
    assert [isinstance(weight, QuantizedWeight) for weight in experts(model)] == [False, True] * 2
    assert_logits_are_the_oracles(model, oracle)


def test_an_expert_whose_inputs_are_in_their_own_order_goes_beside_others(tmp_path: Path) -> None:
    make(tmp_path, "mixtral", PACKINGS["gptq_acts_in_order"], wanted=EXPERTS)
    prefix, size = "model.layers.0.block_sparse_moe.experts.2.w2.", 32

    def put_in_order(tensors: dict[str, torch.Tensor]) -> None:
        """By another input for each number, and so other weights."""
        tensors[f"{prefix}g_idx"] = torch.arange(len(tensors[f"{prefix}g_idx"])).int() // size

    change(tmp_path, put_in_order)
    model = load(tmp_path)
    down = experts(model)[1]
    assert isinstance(down, QuantizedWeight)
    assert down.orders_EK is not None
    assert [bool((order_K.diff() == 1).all()) for order_K in down.orders_EK] == [False, False, True, False]
    expected = logits(load(tmp_path, attention="numba"), TOKENS, attention="numba")
    torch.testing.assert_close(logits(model, TOKENS), expected, atol=1e-4, rtol=1e-4)


def test_layers_that_were_left_whole_stay_so(tmp_path: Path) -> None:
    oracle = make(
        tmp_path, "qwen2", PACKINGS["gptq"], wanted=("q_proj.weight", "k_proj.weight", "down_proj.weight")
    )
    model = load(tmp_path)
    # q and k are in one matrix with v, which is whole.
    assert [isinstance(weight, QuantizedWeight) for weight in products(model)] == [
        *(False, False) * 2,
        *(False, True) * 2,
    ]
    assert_logits_are_the_oracles(model, oracle)


def test_an_output_matrix_may_be_quantised(tmp_path: Path) -> None:
    oracle = make(tmp_path, "llama_whole_words", PACKINGS["awq"], wanted=("_proj.weight", "lm_head.weight"))
    model = load(tmp_path)
    assert isinstance(model.weights.lm_head.weight, QuantizedWeight)
    assert_logits_are_the_oracles(model, oracle)
    assert_logits_are_the_oracles(load(tmp_path, attention="numba"), oracle, attention="numba")


@pytest.mark.parametrize(
    "packing", [Packing(bits=8), Packing(group_size=16)], ids=["zeros_of_8_bits", "groups_of_16"]
)
def test_what_no_kernel_multiplies_as_it_is_becomes_whole(packing: Packing, tmp_path: Path) -> None:
    oracle = make(tmp_path, "llama_bias", packing)
    model = load(tmp_path)
    assert any(isinstance(weight, torch.Tensor) for weight in products(model))
    assert_logits_are_the_oracles(model, oracle)


def test_matrices_of_one_product_whose_groups_differ_become_whole(tmp_path: Path) -> None:
    oracle = make(tmp_path, "llama_bias", Packing(group_size=32))

    def name_groups_anew(tensors: dict[str, torch.Tensor]) -> None:
        """Of the keys alone; they stand for the same weights."""
        prefix, new = "model.layers.0.self_attn.k_proj.", torch.tensor([2, 0, 3, 1])
        tensors[f"{prefix}g_idx"] = new[tensors[f"{prefix}g_idx"].long()].int()
        for end in ("scales", "qzeros"):
            tensors[prefix + end] = torch.empty_like(tensors[prefix + end]).index_copy_(
                0, new, tensors[prefix + end]
            )

    change(tmp_path, name_groups_anew)
    model = load(tmp_path)
    first, second = (layer.qkv.weight for layer in model.weights.layers)
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, QuantizedWeight)
    assert_logits_are_the_oracles(model, oracle)


def test_greedy_answers_are_the_oracles(tmp_path: Path) -> None:
    oracle = make(tmp_path, "qwen3_tied", PACKINGS["gptq_acts_in_order"])
    settings = OfflineSettings(
        compute=ComputeDevice(attention="reference"), max_num_seqs=1, num_pages=4, max_num_batched_tokens=64
    )
    engine = build_engine(load(tmp_path), settings)
    [generation] = engine.generate(
        [(TOKENS, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))]
    )
    expected = oracle.generate(
        torch.tensor([TOKENS]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generation.output_token_ids == expected[0, len(TOKENS) :].tolist()


def test_it_may_be_quantised_anew(tmp_path: Path) -> None:
    oracle = make(tmp_path, "qwen2", PACKINGS["awq"])
    with torch.no_grad():
        expected = oracle(torch.tensor([TOKENS])).logits[0, -1]
    anew = load(tmp_path, quantize="w8a16")
    assert all(weight.numbers_NK.dtype == torch.int8 for weight in products(anew))
    assert (logits(anew, TOKENS) - expected).norm() < 0.05 * expected.norm()


def test_int8_on_the_cpu_is_that_of_the_whole_weights(tmp_path: Path) -> None:
    make(tmp_path / "packed", "qwen2", PACKINGS["gptq_acts_in_order"]).save_pretrained(tmp_path / "whole")
    packed, whole = (
        load_weights(open_checkpoint(path), load_config(path), dtype=torch.float32, packed=Int8Weights)
        for path in (tmp_path / "packed", tmp_path / "whole")
    )
    for ours, theirs in zip(packed.layers, whole.layers, strict=True):
        assert torch.equal(ours.qkv.weight.packed, theirs.qkv.weight.packed)
        assert torch.equal(ours.qkv.weight.scale_EN, theirs.qkv.weight.scale_EN)


def test_the_fingerprint_depends_on_the_numbers_and_on_what_they_mean(tmp_path: Path) -> None:
    make(tmp_path, "llama_bias", PACKINGS["gptq"])

    def fingerprint() -> bytes:
        checkpoint = open_checkpoint(tmp_path)
        return load_model_info(tmp_path, checkpoint, dtype="float32", max_model_len=None).fingerprint

    first = fingerprint()
    edit_config(tmp_path, quantization_config=Packing(v2=True).config())
    second = fingerprint()
    change(tmp_path, lambda tensors: tensors["model.layers.1.mlp.down_proj.qweight"][3, 5].add_(1))
    assert len({first, second, fingerprint()}) == 3
