import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from control_plane.cli.__main__ import app
from control_plane.config import PROJECT_ROOT

DEMO = PROJECT_ROOT / "models" / "demo"


def test_runs_the_profiler_and_says_what_it_wrote(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(DEMO / name, tmp_path / name)
    text = tmp_path / "sample.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    profile = tmp_path / "kv_profile.safetensors"
    for done in ("Wrote", "Replaced"):
        result = CliRunner().invoke(
            app, ["profile-kv", str(tmp_path), "--text", str(text), "--max-tokens", "64"]
        )
        assert result.exit_code == 0, result.output
        assert capfd.readouterr().out.startswith(f"{done} {profile} ")
        assert profile.exists()


def test_a_model_that_is_none_ends_with_the_profilers_message_and_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = CliRunner().invoke(app, ["profile-kv", str(tmp_path / "missing")])
    assert result.exit_code == 2
    assert "missing" in capfd.readouterr().err
