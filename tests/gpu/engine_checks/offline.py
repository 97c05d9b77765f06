"""Whole answers with the kernels in Triton against the same engine with their formulas, computed on the CPU: the
decisions, the engine and, on a GPU, the captured steps that workers serve with.

That those formulas give what the CPU's own engine gives is proven in tests/workers/engine/test_offline.py, on a machine
that has its kernels.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from inputs import DEVICE, IS_INTERPRETED
from noise import FAMILIES, SIZES, make_model, named_noise

from tests.packed_checkpoints import Packing, pack_all, write_file
from workers.compute_device import ComputeDevice
from workers.engine.offline_engine import Model, build_engine, load_model
from workers.engine.offline_settings import OfflineSettings
from workers.request import SamplingParams

LENGTHS = (1, 21, 5) if IS_INTERPRETED else (1, 21, 5, 33, 16, 64, 2)
MAX_TOKENS = 2 if IS_INTERPRETED else 40


def settings(device: str, attention: str, **others: Any) -> OfflineSettings:
    return OfflineSettings(
        **{
            "compute": ComputeDevice(device=device, attention=attention), "max_num_seqs": 3,
            "max_num_batched_tokens": 30, "num_pages": 32, "max_model_len": 112, "dtype": "float32", **others,
        }
    )  # fmt: skip


def answers(
    family: str, *, device: str, attention: str, temperature: float = 0.0, **others: Any
) -> list[list[int]]:
    given = settings(device, attention, **others)
    quantize = None if given.quantize == "none" else given.quantize
    model = make_model(family, device=device, dtype=given.weight_dtype, quantize=quantize)
    return answers_of(model, given, temperature=temperature)


def answers_of(model: Model, given: OfflineSettings, *, temperature: float = 0.0) -> list[list[int]]:
    engine = build_engine(model, given)
    generator = torch.Generator().manual_seed(1)
    generations = engine.generate(
        (
            torch.randint(3, 97, (length,), generator=generator).tolist(),
            SamplingParams(
                temperature=temperature, top_k=20, top_p=0.95, seed=number, max_tokens=MAX_TOKENS + number % 2
            ),
        )
        for number, length in enumerate(LENGTHS)
    )
    engine.state.check()
    return [generation.output_token_ids for generation in generations]


def check_greedy_answers_of_every_family_are_the_formulas() -> None:
    for family in ("llama_bias", "mistral_window", "qwen3_moe") if IS_INTERPRETED else FAMILIES:
        expected = answers(family, device="cpu", attention="reference")
        assert answers(family, device=DEVICE, attention="triton") == expected, family


def check_drawn_answers_are_the_formulas() -> None:
    expected = answers("qwen3", device="cpu", attention="reference", temperature=0.8)
    assert expected != answers("qwen3", device="cpu", attention="reference")
    assert answers("qwen3", device=DEVICE, attention="triton", temperature=0.8) == expected


def check_pages_of_int8_give_the_formulas_answers() -> None:
    if IS_INTERPRETED:  # which takes its time: the kernels' own checks have such pages
        return
    expected = answers("qwen3", device="cpu", attention="reference", kv_dtype="int8")
    got = answers("qwen3", device=DEVICE, attention="triton", kv_dtype="int8")
    # A number at the edge between two steps may fall to either side, and an answer part there.
    assert sum(ours == theirs for ours, theirs in zip(got, expected, strict=True)) >= len(LENGTHS) - 1


def check_quantised_weights_give_the_formulas_answers() -> None:
    for family in ("qwen3_moe_wide",) if IS_INTERPRETED else ("llama_wide", "qwen3_moe_wide"):
        for kind in ("w8a16", "w4a16"):
            expected = answers(family, device="cpu", attention="reference", quantize=kind)
            got = answers(family, device=DEVICE, attention="triton", quantize=kind)
            assert got == expected, (family, kind)


def check_products_of_fp8_begin_their_answers_as_the_formulas_do() -> None:
    if IS_INTERPRETED:  # which halves some numbers: that the products are right the kernels' own checks say
        return
    for family in ("llama_wide", "qwen3_moe_wide"):
        expected = answers(family, device="cpu", attention="reference", quantize="fp8")
        got = answers(family, device=DEVICE, attention="triton", quantize="fp8")
        # A number at the edge between two steps may fall to either side, and an answer part there.
        same = sum(ours[0] == theirs[0] for ours, theirs in zip(got, expected, strict=True))
        assert same >= len(LENGTHS) - 1, (family, got, expected)


def check_packed_checkpoints_give_the_formulas_answers() -> None:
    packings = [
        Packing(acts_in_order=True, group_size=32),
        Packing(method="awq"),
        Packing(bits=8, symmetric=True),
        Packing(group_size=64),
    ]
    cases = [("llama_wide", packings[0]), ("qwen3_moe_wide", packings[0])]
    if not IS_INTERPRETED:
        cases = [(family, packing) for family in ("llama_wide", "qwen3_moe_wide") for packing in packings]
    for family, packing in cases:
        with TemporaryDirectory() as folder:
            path = Path(folder)
            write_file(path / "model.safetensors", pack_all(named_noise(family), packing)[0])
            config = SIZES | FAMILIES[family] | {"quantization_config": packing.config()}
            (path / "config.json").write_text(json.dumps(config))
            got, expected = (
                answers_of(load_model(path, given, on_progress=lambda share: None), given)
                for given in (settings(DEVICE, "triton"), settings("cpu", "reference"))
            )
            assert got == expected, (family, packing)


def check_bfloat16_begins_its_answers_as_the_formulas_do() -> None:
    if IS_INTERPRETED:  # a product of bfloat16 matrices is silently wrong there
        return
    for family in FAMILIES:
        expected = answers(family, device=DEVICE, attention="reference", dtype="bfloat16")
        got = answers(family, device=DEVICE, attention="triton", dtype="bfloat16")
        # Rounding may turn a token that is nearly as likely as another, and all that follow it.
        same = sum(ours[0] == theirs[0] for ours, theirs in zip(got, expected, strict=True))
        assert same >= len(LENGTHS) - 1, (family, got, expected)
