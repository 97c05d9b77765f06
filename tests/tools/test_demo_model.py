import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.demo_card import figure_table
from tools.demo_export import write_model
from tools.demo_network import Network, Shape
from tools.demo_tokenizer import SPECIAL_TOKENS

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "demo"
MOST_BYTES = 12_000_000


def test_all_files_together_stay_within_twelve_megabytes() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= MOST_BYTES


def test_the_configuration_is_that_of_the_network_we_train() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config == Shape().hugging_face()
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, len(SPECIAL_TOKENS) - 1)


def test_an_exported_network_gives_the_same_logits_in_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network(Shape(vocab_size=96, hidden_size=64, num_hidden_layers=2))
    with (
        torch.no_grad()
    ):  # the file holds bfloat16: round here, so that both sides compute with the same weights
        for parameter in network.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).bfloat16())
    write_model(network, Tokenizer.from_file(str(MODEL / "tokenizer.json")), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train(False)
    tokens_NT = torch.randint(96, (2, 50))
    with torch.inference_mode():
        torch.testing.assert_close(network(tokens_NT), theirs(tokens_NT).logits, atol=2e-4, rtol=1e-3)


def test_the_card_states_the_figures_of_the_bench() -> None:
    report = json.loads((ROOT / "bench" / "results" / "demo_model.json").read_text())
    assert {"recall_512", "perplexity"} <= {claim["name"] for claim in report["claims"]}
    assert figure_table(report["claims"]) in (MODEL / "README.md").read_text()


def test_what_the_card_says_to_ask_is_answered_as_it_says() -> None:
    section = (MODEL / "README.md").read_text().partition("## What to ask")[2].partition("## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if "` | `" in line]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).train(False)
    messages: list[dict[str, str]] = []
    for task, *cells in rows:
        question, expected = (cell.strip(" |").strip("`").replace("⏎", "\n") for cell in cells)
        if "next turn" not in task:
            messages = []
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        told = model.generate(**prompt, do_sample=False, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
        answer = tokenizer.decode(told, skip_special_tokens=True)
        assert answer == expected, task
        messages.append({"role": "assistant", "content": answer})
    assert len(rows) == 5


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "tokenizer_config.json"])
def test_the_directory_has_what_a_server_looks_for(name: str) -> None:
    assert (MODEL / name).stat().st_size > 0
