"""`python3 -m workers.engine.offline` as it is called, and on a machine that has nothing but torch and Triton."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.packed_checkpoints import Packing, pack_all
from tests.workers.engine.bare import BARE
from workers.engine.offline import main

ROOT = Path(__file__).resolve().parents[3]
RUN = "from workers.engine.offline import main; sys.exit(main(sys.argv[1:]))"
PROMPTS = [[5, 9, 33, 20, 7], [4, 4, 8], list(range(3, 40))]


def prompt_ids() -> list[str]:
    return [f"--prompt-ids={','.join(map(str, prompt))}" for prompt in PROMPTS]


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_it_runs_where_nothing_but_torch_and_triton_is_installed(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(checkpoint), *prompt_ids(), "--max-tokens", "6"]
    run = subprocess.run(
        [sys.executable, "-c", BARE + RUN, *arguments, "--attention", "reference"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert main(arguments) == 0
    assert [json.loads(line) for line in run.stdout.splitlines()] == lines_of(capsys)


@pytest.mark.parametrize("packing", [Packing(method="awq", group_size=32), Packing(group_size=32)])
def test_a_packed_checkpoint_is_answered_there_as_with_whole_weights(
    packing: Packing, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": packing.config()}))
    attention = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
    file, _ = pack_all(load_file(checkpoint / "model.safetensors"), packing, wanted=attention)
    save_file(file, tmp_path / "model.safetensors")
    arguments = [str(tmp_path), *prompt_ids(), "--max-tokens", "6"]
    run = subprocess.run(
        [sys.executable, "-c", BARE + RUN, *arguments, "--attention", "reference"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert main(arguments) == 0
    assert [json.loads(line) for line in run.stdout.splitlines()] == lines_of(capsys)


def test_a_file_of_texts_and_of_token_ids_is_answered_line_by_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(checkpoint), *prompt_ids()[:1], "--max-tokens", "4"])
    [by_ids] = lines_of(capsys)
    (tmp_path / "prompts").write_text('"5"\n\n[5, 9, 33, 20, 7]\n')
    assert main([str(checkpoint), "--prompts", str(tmp_path / "prompts"), "--max-tokens", "4"]) == 0
    text, ids = lines_of(capsys)
    assert ids["token_ids"] == by_ids["token_ids"]
    assert text["text"] == "".join(chr(48 + int(token)) for token in text["token_ids"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-ids=5,x"], "'x'"),
        (["--prompt-ids=5,64"], "token id 64 is not in the vocabulary of 64"),
        (["--prompts=nowhere"], "nowhere"),
        (["--prompt-ids=5", "--device=tpu"], "device must be one of cpu, cuda, cuda:N, got 'tpu'"),
        (["--prompt-ids=5", "--num-pages=0"], "num_pages must be at least 1, got 0"),
        (["--prompt-ids=5", "--max-model-len=999"], "the model's 256, got 999"),
        (["--prompt-ids=5", "--temperature=-1"], "temperature must be between 0.0 and 100.0, got -1.0"),
        (["--prompt-ids=5", "--kv-dtype=int4"], "kv_dtype must be one of"),
    ],
)
def test_what_cannot_run_is_one_line_that_names_it(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(checkpoint), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_directory_without_a_checkpoint_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "--prompt-ids=5"]) == 1
    assert "config.json does not exist" in capsys.readouterr().err
