"""Quantised weights against the whole ones that they stand for."""

import zlib
from dataclasses import replace
from functools import partial

import pytest
import torch

from kernels.gpu.quantized_weight import QuantizedWeight
from tests.workers.model.packed_models import TOKENS, logits
from workers.compute_device import ComputeDevice
from workers.engine.offline_engine import Model, build_engine
from workers.engine.offline_settings import OfflineSettings
from workers.model.config import parse_config
from workers.model.quantize import QUANTIZERS, quantized_product
from workers.model.weights import DenseMlp, Linear, ModelWeights, MoeMlp, load_weights
from workers.request import SamplingParams

SIZES = {
    "vocab_size": 97, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "dense": parse_config({**SIZES, "architectures": ["Qwen2ForCausalLM"]}),
    "experts": parse_config(
        {
            **SIZES, "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 32, "moe_intermediate_size": 128,
            "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True,
        }
    ),
}  # fmt: skip


class Noise:
    """Tensors that depend on their name alone."""

    def has(self, name: str) -> bool:
        return True

    def copy_into(self, target: torch.Tensor, name: str) -> None:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        target.copy_(0.2 * torch.randn(target.shape, generator=generator))


@pytest.mark.parametrize(("kind", "steps"), [("w8a16", 254), ("w4a16", 15)])
def test_a_number_is_off_by_half_a_step_of_its_group_at_most(kind: str, steps: int) -> None:
    weight_NK = torch.randn(5, 384, generator=torch.Generator().manual_seed(2)) * torch.rand(5, 1) * 3
    quantized = QUANTIZERS[kind](weight_NK)
    groups = weight_NK.unflatten(1, (3, 128))
    extent = 2 * groups.abs().amax(-1) if kind == "w8a16" else groups.amax(-1) - groups.amin(-1)
    # The zero of 4 bits is rounded too, and may push the last number off its scale by half a step more.
    allowed = extent / steps * (0.5001 if kind == "w8a16" else 1.0001)
    assert ((quantized.whole() - weight_NK).abs().unflatten(1, (3, 128)).amax(-1) <= allowed).all()


def test_fp8_is_off_by_a_sixteenth_of_the_number_or_less() -> None:
    weight_NK = torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    error = (QUANTIZERS["fp8"](weight_NK).whole() - weight_NK).abs()
    assert (error <= weight_NK.abs() / 16 + weight_NK.abs().max() / 448 / 500).all()


@pytest.mark.parametrize("kind", sorted(QUANTIZERS))
def test_zeros_stay_zeros(kind: str) -> None:
    assert not QUANTIZERS[kind](torch.zeros(2, 128)).whole().any()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", ["w8a16", "w4a16"])
def test_a_model_answers_as_one_with_the_weights_that_its_own_stand_for(kind: str, family: str) -> None:
    quantized = noise_model(family, kind)
    assert answer(quantized) == answer(replace(quantized, weights=whole(quantized.weights)))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("kind", "least", "most"), [("w8a16", 1e-3, 0.02), ("w4a16", 0.02, 0.3), ("fp8", 0.02, 0.15)]
)
def test_logits_are_off_by_what_the_rounding_costs(kind: str, least: float, most: float, family: str) -> None:
    model = noise_model(family)
    expected = logits(model, TOKENS)
    got = logits(noise_model(family, kind), TOKENS)
    assert least < float((got - expected).norm() / expected.norm()) < most


@pytest.mark.parametrize("family", CONFIGS)
def test_fp8_rounds_what_is_multiplied_too(family: str) -> None:
    model = noise_model(family)
    quantized = noise_model(family, "fp8")
    with_whole_rows = replace(quantized, weights=whole(quantized.weights))
    errors = [
        float((logits(one, TOKENS) - logits(model, TOKENS)).norm()) for one in (with_whole_rows, quantized)
    ]
    assert 1.1 * errors[0] < errors[1]


@pytest.mark.parametrize("kind", sorted(QUANTIZERS))
@pytest.mark.parametrize(("num_inputs", "size"), [(256, 128), (192, 64), (96, 32)])
def test_groups_are_as_large_as_fit(kind: str, num_inputs: int, size: int) -> None:
    weight_NK = torch.randn(5, num_inputs, generator=torch.Generator().manual_seed(2))
    quantized = QUANTIZERS[kind](weight_NK)
    assert quantized.group_size == size
    assert (quantized.whole() - weight_NK).norm() < 0.2 * weight_NK.norm()


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_small_or_sensitive_stays_whole(family: str) -> None:
    quantized, model = noise_model(family, "w4a16").weights, noise_model(family).weights
    assert torch.equal(quantized.lm_head.weight, model.lm_head.weight)
    assert torch.equal(quantized.embedding_VD, model.embedding_VD)
    for ours, theirs in zip(quantized.layers, model.layers, strict=True):
        if isinstance(ours.mlp, MoeMlp):
            assert isinstance(theirs.mlp, MoeMlp)
            assert torch.equal(ours.mlp.router.weight, theirs.mlp.router.weight)


def test_inputs_that_are_not_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"q_proj has 100 inputs, which are not whole groups of 128, 64, 32"):
        quantized_product(Noise(), "w8a16", [{"q_proj": 2}], 100, torch.device("cpu"))


def noise_model(family: str, kind: str | None = None) -> Model:
    config = CONFIGS[family]
    stored = None if kind is None else partial(quantized_product, Noise(), kind)
    weights = load_weights(Noise(), config, dtype=torch.float32, stored=stored)
    return Model(config=config, weights=weights, eos_token_ids=frozenset())


def answer(model: Model) -> list[int]:
    settings = OfflineSettings(
        compute=ComputeDevice(attention="reference"), max_num_seqs=1, num_pages=4, max_num_batched_tokens=64
    )
    engine = build_engine(model, settings)
    [generation] = engine.generate([([5, 9, 60, 33], SamplingParams(temperature=0.0, max_tokens=20))])
    return generation.output_token_ids


def whole(weights: ModelWeights) -> ModelWeights:
    def linear(quantized: Linear) -> Linear:
        return Linear(matrix(quantized.weight), quantized.bias)

    def matrix(weight: object) -> torch.Tensor:
        assert isinstance(weight, QuantizedWeight)
        return weight.whole()

    layers = []
    for layer in weights.layers:
        if isinstance(layer.mlp, DenseMlp):
            mlp: DenseMlp | MoeMlp = DenseMlp(gate_up=linear(layer.mlp.gate_up), down=linear(layer.mlp.down))
        else:
            gate_up_EWD, down_EDI = (
                matrix(weight).unflatten(0, (layer.mlp.config.num_experts, -1))
                for weight in (layer.mlp.gate_up_EWD, layer.mlp.down_EDI)
            )
            mlp = replace(layer.mlp, gate_up_EWD=gate_up_EWD, down_EDI=down_EDI)
        layers.append(replace(layer, qkv=linear(layer.qkv), output=linear(layer.output), mlp=mlp))
    return replace(weights, layers=tuple(layers))
