"""Rows of tokens with a weight per token, from conversations and documents: what a training step eats."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import torch
from tokenizers import Tokenizer

from tools.demo_tasks import Conversation, training_conversation
from tools.demo_tokenizer import ASSISTANT, BOS, END, SPECIAL_TOKENS, SYSTEM, USER

COUNTED_WEIGHT = 2.0
LEADING_WEIGHT = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """N rows of T+1 tokens. weights_NT belongs to the token that follows; kinds[n] names the row's task."""

    tokens_NT: torch.Tensor
    weights_NT: torch.Tensor
    kinds: tuple[str, ...]


class Encoder:
    """Turns conversations and documents into token ids. Short pieces repeat, so they are remembered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = lru_cache(maxsize=20_000)(lambda text: tokenizer.encode(text).ids)
        self._ids = {name: index for index, name in enumerate(SPECIAL_TOKENS)}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, line by line: the tokenizer never joins a line end to what follows it."""
        found: list[int] = []
        for line in text.splitlines(keepends=True):
            found += self._encode(line)
        return found

    def conversation(self, conversation: Conversation) -> tuple[list[int], list[float]]:
        """Ids as the chat template writes them, and a weight for every id (0: not learnt)."""
        ids, weights = [self._ids[BOS]], [0.0]

        def add(new: list[int], weight: float) -> None:
            ids.extend(new)
            weights.extend([weight] * len(new))

        if conversation.system is not None:
            add([self._ids[SYSTEM], *self.encode(conversation.system), self._ids[END]], 0.0)
        for turn in conversation.turns:
            add([self._ids[USER], *self.encode(turn.question), self._ids[END], self._ids[ASSISTANT]], 0.0)
            for piece in turn.answer:
                lead = LEADING_WEIGHT if piece.learnt else 0.0
                add(self.encode(piece.text), COUNTED_WEIGHT if piece.counts else lead)
            add([self._ids[END]], LEADING_WEIGHT)
        return ids, weights

    def documents(self, documents: Sequence[str]) -> torch.Tensor:
        """All documents in one run of ids, BOS before each."""
        found: list[int] = []
        for document in documents:
            found += [self._ids[BOS], *self.encode(document)]
        return torch.tensor(found)


def task_row(rng: Random, encoder: Encoder, kind: str, *, num_tokens: int) -> tuple[list[int], list[float]]:
    """`num_tokens` tokens of conversations of one kind, the last one cut off."""
    ids: list[int] = []
    weights: list[float] = []
    while len(ids) < num_tokens:
        conversation = training_conversation(rng, kind, num_tokens=num_tokens)
        new_ids, new_weights = encoder.conversation(conversation)
        ids += new_ids
        weights += new_weights
    return ids[:num_tokens], weights[:num_tokens]


def make_batch(
    rng: Random, encoder: Encoder, text: torch.Tensor, *, shares: dict[str, float], shape: tuple[int, int]
) -> Batch:
    """A batch of `shape` (rows, tokens to predict in each); the kind of each row is drawn by `shares`."""
    num_rows, num_tokens = shape
    kinds = tuple(rng.choices(list(shares), weights=list(shares.values()), k=num_rows))
    tokens_NT = torch.zeros(num_rows, num_tokens + 1, dtype=torch.long)
    weights_NT = torch.ones(num_rows, num_tokens)
    for row, kind in enumerate(kinds):
        if kind == "text":
            start = rng.randrange(len(text) - num_tokens - 1)
            tokens_NT[row] = text[start : start + num_tokens + 1]
        else:
            ids, weights = task_row(rng, encoder, kind, num_tokens=num_tokens + 1)
            tokens_NT[row] = torch.tensor(ids)
            weights_NT[row] = torch.tensor(weights[1:])
    return Batch(tokens_NT=tokens_NT, weights_NT=weights_NT, kinds=kinds)
