"""The bench of the engine on a GPU, run on a CPU with a tiny model: that it runs and claims what the issue names."""

import pytest
import torch

from bench import gpu_engine, gpu_peers
from bench.gpu_limits import Limits
from workers.compute_device import ComputeDevice
from workers.engine.offline_settings import OfflineSettings

TINY = {
    **gpu_engine.LLAMA_3_8B, "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def make_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(gpu_engine, "LLAMA_3_8B", TINY)
    settings = OfflineSettings(
        compute=ComputeDevice(attention="reference"),
        max_num_seqs=64,
        max_num_batched_tokens=80,
        num_pages=1024,
    )
    monkeypatch.setattr(gpu_engine, "SETTINGS", settings)
    monkeypatch.setattr(gpu_engine, "CONTEXT", 20)
    monkeypatch.setattr(gpu_engine, "PROMPT", 80)
    for name, value in {"NUM_WARMUP": 2, "NUM_STEPS": 4, "NUM_PROMPTS": 1}.items():
        monkeypatch.setattr(gpu_engine, name, value)


def test_it_claims_decode_at_both_batches_and_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(monkeypatch)
    claims = gpu_engine.measure(Limits(copy_gb_s=1.0, matrix_tflop_s=0.01))
    assert [claim.name for claim in claims] == [
        "prefill_of_matrix_rate",
        "decode_b1_of_floor",
        "decode_b64_of_floor",
    ]
    assert all(claim.value > 0 for claim in claims)


class At:
    """An event of the device."""

    def __init__(self, ms: float) -> None:
        self._ms = ms

    def elapsed_time(self, later: "At") -> float:
        return later._ms - self._ms


def test_gaps_are_the_time_between_graphs() -> None:
    marks = [(At(10.0), At(18.0)), (At(20.0), At(28.0)), (At(28.0), At(30.0))]
    assert gpu_engine.gap_share(marks) == pytest.approx(2 / 20)  # type: ignore[arg-type]  # as events are


def test_transformers_is_measured_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny(monkeypatch)
    gpu_peers.print_transformers(device="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        "prefill of 80", "decode step at batch 1", "decode step at batch 64"
    ]  # fmt: skip


def test_the_weights_of_a_llama_of_8_billion_are_counted() -> None:
    """7.5 billion without the embedding, as its card says of 8.03 with it."""
    hidden, mlp, layers, vocab = 4096, 14_336, 32, 128_256
    expected = layers * (hidden * (hidden + 2 * 1024) + hidden * hidden + 3 * hidden * mlp) + vocab * hidden
    config = gpu_engine.parse_config(gpu_engine.LLAMA_3_8B)
    weights = gpu_engine.load_weights(Nothing(), config, dtype=torch.bfloat16, device=torch.device("meta"))
    assert gpu_engine.num_multiplied_weights(weights) == expected


class Nothing:
    def has(self, name: str) -> bool:
        return True

    def copy_into(self, target: torch.Tensor, name: str) -> None:
        pass
