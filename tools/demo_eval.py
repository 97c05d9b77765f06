"""How good the demo model is: accuracy per task on held-out problems, perplexity on held-out text.

An answer is right when every one of its tokens, the end mark included, is the likeliest one after the right
tokens before it. That is the same as greedy decoding writing exactly the answer, at the price of one pass
over the whole conversation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F

from tools.demo_corpus import load_documents
from tools.demo_rows import Encoder
from tools.demo_tasks import (
    DIGIT_ITEM_TOKENS,
    WORD_ITEM_TOKENS,
    Conversation,
    arithmetic,
    copy,
    json_object,
    recall,
)

RECALL_LENGTHS = (128, 256, 512, 1024, 2048)  # tokens of prompt
TEXT_TOKENS = 512  # a document's loss is measured in windows of this many tokens
FRAME_TOKENS = 16  # what a recall prompt has besides its list

# tokens [1, T] -> logits [1, T, V], so that one evaluation serves every implementation of the model.
LogitsFunction = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What the model card and the bench state. Accuracies are shares from 0 to 1."""

    perplexity: float
    bits_per_byte: float
    accuracy: dict[str, float]
    num_samples: int


def held_out_tasks(*, num_samples: int) -> dict[str, list[Conversation]]:
    """The evaluation's problems by task: the same on every machine."""
    tasks: dict[str, list[Conversation]] = {}
    for length in RECALL_LENGTHS:
        tasks[f"recall_{length}"] = [
            recall_problem(Random(f"recall:{length}:{index}"), num_tokens=length)
            for index in range(num_samples)
        ]
    makers: dict[str, Callable[[Random], Conversation]] = {
        "copy": lambda rng: copy(rng, num_words=rng.randint(4, 40), held_out=True),
        "arithmetic": lambda rng: arithmetic(rng, num_turns=1, held_out=True),
        "json": lambda rng: json_object(rng, num_turns=1, held_out=True),
    }
    for name, make in makers.items():
        tasks[name] = [make(Random(f"{name}:{index}")) for index in range(num_samples)]
    return tasks


def recall_problem(rng: Random, *, num_tokens: int) -> Conversation:
    """One question about a list that makes the prompt about `num_tokens` long; half of the values are numbers."""
    item = (DIGIT_ITEM_TOKENS + WORD_ITEM_TOKENS) / 2
    return recall(rng, num_items=int((num_tokens - FRAME_TOKENS) / item), num_turns=1, held_out=True)


def evaluate(logits_of: LogitsFunction, encoder: Encoder, *, num_samples: int) -> Figures:
    """All the figures, from `num_samples` problems a task and all held-out documents."""
    with torch.inference_mode():
        accuracy = {
            name: sum(is_right(logits_of, encoder, one) for one in conversations) / len(conversations)
            for name, conversations in held_out_tasks(num_samples=num_samples).items()
        }
        perplexity, bits_per_byte = text_loss(logits_of, encoder, load_documents(held_out=True))
    return Figures(
        perplexity=perplexity, bits_per_byte=bits_per_byte, accuracy=accuracy, num_samples=num_samples
    )


def is_right(logits_of: LogitsFunction, encoder: Encoder, conversation: Conversation) -> bool:
    """Whether greedy decoding gives every answer of the conversation exactly."""
    ids, weights = encoder.conversation(conversation)
    tokens_T = torch.tensor(ids)
    learnt_T = torch.tensor(weights[1:]) > 0
    best_T = logits_of(tokens_T[None, :-1])[0].argmax(-1)
    return bool((best_T == tokens_T[1:])[learnt_T].all())


def text_loss(logits_of: LogitsFunction, encoder: Encoder, documents: Sequence[str]) -> tuple[float, float]:
    """Perplexity per token and bits per byte of text, in windows that do not overlap."""
    tokens = encoder.documents(documents)
    num_bytes = sum(len(document.encode()) for document in documents)
    nats, count = 0.0, 0
    for start in range(0, len(tokens) - 1, TEXT_TOKENS):
        window_T = tokens[start : start + TEXT_TOKENS + 1]
        logits_TV = logits_of(window_T[None, :-1])[0].float()
        nats += F.cross_entropy(logits_TV, window_T[1:], reduction="sum").item()
        count += len(window_T) - 1
    return math.exp(nats / count), nats / math.log(2) / num_bytes
