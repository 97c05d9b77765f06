"""Checkpoints in the layouts of AWQ and GPTQ against transformers with the weights that their numbers stand for."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kernels.gpu.quantized_linear import QuantizedWeight
from kernels.int8_linear import Int8Weights
from tests.packed_checkpoints import Packing, pack_all
from workers.engine.backends import BACKENDS
from workers.engine.offline_engine import Model, build_engine, load_model
from workers.engine.offline_settings import OfflineSettings
from workers.errors import CheckpointError
from workers.model.config import load_config
from workers.model.info import load_model_info
from workers.model.kv_pages import allocate_pages
from workers.model.quantized_checkpoint import open_checkpoint
from workers.model.token_batch import Chunk, ChunkBounds, TokenBatch
from workers.model.weights import DenseMlp, load_weights
from workers.request import SamplingParams

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_whole_words": ("Llama", {"vocab_size": 96}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "qwen3_tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}
MOE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 32, "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2},
    ),
}
PACKINGS = {
    "awq": Packing(method="awq"),
    "awq_64": Packing(method="awq", group_size=64),
    "gptq": Packing(),
    "gptq_v2": Packing(v2=True),
    "gptq_symmetric": Packing(symmetric=True),
    "gptq_acts_in_order": Packing(acts_in_order=True, group_size=32),
    "gptq_whole_rows": Packing(group_size=-1),
    "gptq_8_bits": Packing(bits=8, symmetric=True),
    "gptq_8_bits_acts_in_order": Packing(bits=8, symmetric=True, acts_in_order=True, group_size=64),
}  # fmt: skip
TOKENS = [5, 9, 60, 33, 7, 80, 12, 41, 41, 3, 25, 90, 66]


def make(path: Path, family: str, packing: Packing, **how: Any) -> Any:
    """Writes a random model, packed; returns the oracle with the weights that it stands for."""
    kind, changes = (FAMILIES | MOE)[family]
    torch.manual_seed(5)
    oracle = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**SIZES | changes)
    )
    oracle.eval().save_pretrained(path)
    file, meant = pack_all(load_file(path / "model.safetensors"), packing, **how)
    save_file(meant, path / "model.safetensors")
    oracle = type(oracle).from_pretrained(path)
    save_file(file, path / "model.safetensors")
    edit_config(path, quantization_config=packing.config())
    return oracle


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")


def load(path: Path, *, attention: str = "reference", **settings: Any) -> Model:
    given = OfflineSettings(attention=attention, **settings)
    return load_model(path, given, on_progress=lambda share: None)


def logits(model: Model, tokens: Sequence[int], *, attention: str = "reference") -> torch.Tensor:
    """After the last token of a prompt."""
    pages = allocate_pages(
        model.config, num_pages=1, block=16, dtype=torch.float32, device=torch.device("cpu")
    )
    count = len(tokens)
    page = torch.zeros(1, 1, dtype=torch.int32)
    batch = TokenBatch(
        token_ids_T=torch.tensor(tokens), positions_T=torch.arange(count), slots_T=torch.arange(count),
        rows_T=torch.zeros(count, dtype=torch.int64), table_RL=page, num_singles=0,
        chunks=(Chunk(start=0, stop=count, num_prefix=0, pages=page[0]),), sampled_S=torch.tensor([count - 1]),
        chunk_bounds=ChunkBounds(starts=torch.tensor([0, count]), lengths_N=torch.tensor([count])),
    )  # fmt: skip
    backend = BACKENDS[attention](model.config, model.weights, pages, 64)
    return backend.transformer.forward(batch)[0]


@torch.no_grad()
def assert_logits_are_the_oracles(model: Model, oracle: Any, *, attention: str = "reference") -> None:
    expected = oracle(torch.tensor([TOKENS])).logits[0, -1]
    torch.testing.assert_close(logits(model, TOKENS, attention=attention), expected, atol=1e-4, rtol=1e-4)


def products(model: Model) -> list[Any]:
    layers = model.weights.layers
    dense = [layer.mlp for layer in layers if isinstance(layer.mlp, DenseMlp)]
    return [
        linear.weight
        for linear in [
            *(linear for layer in layers for linear in (layer.qkv, layer.output)),
            *(linear for mlp in dense for linear in (mlp.gate_up, mlp.down)),
        ]
    ]


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


@pytest.mark.parametrize("family", sorted(MOE))
def test_experts_are_whole_on_the_cpu_and_refused_where_no_product_takes_them(
    family: str, tmp_path: Path
) -> None:
    ends = ("_proj.weight", "w1.weight", "w2.weight", "w3.weight")
    oracle = make(tmp_path, family, PACKINGS["awq"], wanted=ends)
    assert_logits_are_the_oracles(load(tmp_path, attention="numba"), oracle, attention="numba")
    with pytest.raises(CheckpointError, match=r"experts\.0\.\w+ is quantised, and a GPU's kernels multiply"):
        load(tmp_path)
    assert logits(load(tmp_path, quantize="int8"), TOKENS).isfinite().all()


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


def test_greedy_answers_are_the_oracles(tmp_path: Path) -> None:
    oracle = make(tmp_path, "qwen3_tied", PACKINGS["gptq_acts_in_order"])
    settings = OfflineSettings(attention="reference", num_slots=1, num_pages=4)
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
    anew = load(tmp_path, quantize="int8")
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
