"""What quantized weights cost the shipped model: its figures, computed with and without, and the logits' error.

The problems and texts are those of `bench.demo_model`, held out from training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.kv_quality import Model
from tools.demo_corpus import load_documents
from tools.demo_eval import TEXT_TOKENS, Figures, evaluate

MODEL = Path(__file__).resolve().parent.parent / "models" / "demo"
NUM_WINDOWS = 16  # of TEXT_TOKENS tokens, for the error of the logits


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    figures: Figures
    logits_error: float  # norm of the difference to float32's, against the norm of float32's
    same_best: float  # share of places whose likeliest next token is float32's


def qualities(quantizations: Sequence[str], *, num_samples: int) -> list[Quality]:
    """Of each, the first of which is none, from so many problems a task and all held-out documents."""
    models = [Model(MODEL, quantize=quantize) for quantize in quantizations]
    tokens = models[0].encoder.documents(load_documents(held_out=True))
    logits = [
        torch.cat([model.logits(tokens[None, start : start + TEXT_TOKENS]) for start in _starts(len(tokens))])
        for model in models
    ]
    return [
        Quality(
            figures=evaluate(model.logits, model.encoder, num_samples=num_samples),
            logits_error=float((ours - logits[0]).norm() / logits[0].norm()),
            same_best=float((ours.argmax(-1) == logits[0].argmax(-1)).float().mean()),
        )
        for model, ours in zip(models, logits, strict=True)
    ]


def _starts(num_tokens: int) -> range:
    """Of windows all over the text."""
    return range(0, num_tokens - TEXT_TOKENS, num_tokens // NUM_WINDOWS)
