"""The demo model's card: its figures are those that bench/demo_model.py wrote."""

import json
from pathlib import Path
from typing import Any

from tools.demo_network import Network

CARD = """\
---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
---

# The demo model of Penstock

A small mixture of experts, trained from nothing for this project, so that `penstock up` has something to
serve on a laptop and a test can see when a change hurts quality. It answers four kinds of small, checkable
tasks; it is no assistant, and what it says about anything else is noise.

{shape}

## Figures

{figures}

Measured by `make bench BENCH=demo_model` on {hardware}. Everything measured is held out: one tenth of all
pairs of key and value, of sums, of objects and of documents, chosen by hash, was never trained on. An
answer counts when greedy decoding writes it exactly, end mark included. `recall_512` is a prompt of 512
tokens: a list of `key value` lines and the question for one of them; half of the values are numbers of
three digits, half are words.

## What to ask

| Task | User | Right answer |
|---|---|---|
| recall | `Table:⏎value 117⏎array object⏎Look up:⏎array` | `array object` |
| recall, next turn | `value` | `value 117` |
| copy | `Repeat:⏎value,array,after` | `value,array,after` |
| arithmetic | `Add:⏎23+45` | `23+45=68` |
| JSON | `JSON:⏎name=value⏎size=14⏎ready=yes` | `{{"name": "value", "size": 14, "ready": true}}` |

⏎ is a line end. Keys and words that are one token each ({words} of them, in `tools/demo_words.txt`) work
best. Sums are of numbers below a hundred, and not all come out right: the figure above says how many that the model
never saw do. The chat template takes the roles system, user and assistant; `<|end|>` ends a message.

## Data and training

The text is what every Python ships: the language reference inside pydoc and the docstrings of the standard
library. The tasks are generated.
{training}
The last level of the curriculum, the form of the JSON task and the end of the learning rate's fall were changed
on the way, on one busy CPU core, so a new run gives figures like these, not the same weights.
`tools/train_demo_model.py` makes all of it, tokenizer included, and measures nothing on its own: the bench does.
It takes `--device cuda` too; that has not been tried yet.

## Limits

English technical text only, {positions} tokens of context, no knowledge to speak of, no safety training.
The perplexity is per token of its own small vocabulary and cannot be compared with that of other models.
"""


def write_card(directory: Path, *, report: Path, training: str) -> None:
    """Writes README.md into `directory` from a report of bench/demo_model.py and a sentence on the training."""
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    words = len((Path(__file__).with_name("demo_words.txt")).read_text(encoding="utf-8").split())
    text = CARD.format(
        shape=_shape_table(config),
        figures=figure_table(found["claims"]),
        hardware=found["hardware"],
        training=training,
        words=words,
        positions=config["max_position_embeddings"],
    )
    (directory / "README.md").write_text(text, encoding="utf-8")


def figure_table(claims: list[dict[str, Any]]) -> str:
    """A line per claim; shares as percent."""
    lines = ["| Figure | Held out | Aim |", "|---|---|---|"]
    for claim in claims:
        lines.append(f"| {claim['name']} | {_shown(claim, 'value')} | {_shown(claim, 'aim')} |")
    return "\n".join(lines)


def _shown(claim: dict[str, Any], field: str) -> str:
    return f"{claim[field]:.1%}" if claim["unit"] == "share" else f"{claim[field]:.4g}"


def _shape_table(config: dict[str, Any]) -> str:
    lines = ["| Qwen3-MoE architecture | |", "|---|---|"]
    for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts",
        "num_experts_per_tok", "moe_intermediate_size", "vocab_size",
    ):  # fmt: skip
        lines.append(f"| {name} | {config[name]} |")
    return "\n".join(lines)


def training_sentence(network: Network, *, num_steps: int, num_tokens: int) -> str:
    """What the card says about the length of the training."""
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return (
        f"These weights ({num_parameters / 1e6:.1f} million parameters, bfloat16) saw {num_tokens / 1e6:.1f} million "
        f"tokens in {num_steps} steps."
    )
