import shutil
from pathlib import Path

import pytest

from kvstore.codec.levels import NUM_CACHEGEN_LEVELS
from kvstore.codec.profile import load_profile
from kvstore.errors import ProfileMismatch
from workers.model.checkpoint import PROFILE_FILE, Checkpoint
from workers.model.info import ModelInfo, load_model_info
from workers.profile_kv import main

DEMO = Path(__file__).parents[2] / "models" / "demo"


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(DEMO / name, tmp_path / name)
    return tmp_path


def info_of(model_path: Path, *, dtype: str = "float32", quantize: str = "none") -> ModelInfo:
    return load_model_info(
        model_path, Checkpoint(model_path), dtype=dtype, quantize=quantize, max_model_len=None
    )


def test_writes_a_profile_of_the_model(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = info_of(model_path)
    text = model_path / "sample.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    assert main(["--model-path", str(model_path), "--text", str(text)]) == 0
    assert "cachegen-1" in capsys.readouterr().out
    after = info_of(model_path)
    assert after.fingerprint == before.fingerprint, "the profile is no weight"
    profile = load_profile(model_path / PROFILE_FILE, fingerprint=after.fingerprint, layout=after.layout)
    assert profile is not None
    assert len(profile.levels) == NUM_CACHEGEN_LEVELS
    other = info_of(model_path, dtype="bfloat16")
    with pytest.raises(ProfileMismatch, match=other.fingerprint.hex()):
        load_profile(model_path / PROFILE_FILE, fingerprint=other.fingerprint, layout=other.layout)


def test_a_profile_of_a_quantized_model_is_of_no_other(model_path: Path) -> None:
    assert main(["--model-path", str(model_path), "--max-tokens", "64", "--quantize", "int8"]) == 0
    exact, int8 = info_of(model_path), info_of(model_path, quantize="int8")
    profile = model_path / PROFILE_FILE
    assert load_profile(profile, fingerprint=int8.fingerprint, layout=int8.layout) is not None
    with pytest.raises(ProfileMismatch, match=exact.fingerprint.hex()):
        load_profile(profile, fingerprint=exact.fingerprint, layout=exact.layout)


def test_reads_the_language_reference_unless_told_otherwise(model_path: Path) -> None:
    assert main(["--model-path", str(model_path), "--max-tokens", "512"]) == 0
    assert (model_path / PROFILE_FILE).exists()


def test_the_profile_that_ships_is_of_the_model_that_ships() -> None:
    info = info_of(DEMO)
    profile = load_profile(DEMO / PROFILE_FILE, fingerprint=info.fingerprint, layout=info.layout)
    assert profile is not None
    assert profile.bits_per_level[-1] < 8 / 3.5
    assert (DEMO / PROFILE_FILE).stat().st_size < 2**20


def test_says_what_is_wrong_with_a_model_or_a_text(
    model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = model_path / "short.txt"
    short.write_text("too short")
    assert main(["--model-path", str(model_path), "--text", str(short)]) == 2
    assert "less than one block" in capsys.readouterr().err
    assert main(["--model-path", str(model_path), "--text", str(model_path / "missing")]) == 2
    (model_path / "model.safetensors").write_bytes(b"garbage")
    assert main(["--model-path", str(model_path)]) == 2
    assert "model.safetensors" in capsys.readouterr().err
