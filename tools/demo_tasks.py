"""Tasks in chat form whose answers can be checked: recall, copying, sums, JSON objects.

A conversation is a list of turns; every assistant's turn is a list of pieces, so that the trainer knows
which tokens count (the value that was asked for) and which only lead to it. One tenth of all pairs, sums
and objects, chosen by hash, is held out: the trainer never shows them, the evaluation shows nothing else.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tools.demo_corpus import is_held_out
from tools.demo_tokenizer import load_words

WORDS = load_words()
WORD_ITEM_TOKENS = 3  # key, value, line end
DIGIT_ITEM_TOKENS = 5  # key, three digits, line end
MAX_ITEMS = 600  # leaves words that are keys of nothing
SYSTEM_PROMPT = "You are the demo model of Penstock. Answer in as few words as you can."


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Text of an answer.

    `counts` marks what the accuracy of the task is measured on; some leads cannot be guessed.
    """

    text: str
    counts: bool = False
    learnt: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A user's message and the right answer to it."""

    question: str
    answer: tuple[Piece, ...]

    @property
    def answer_text(self) -> str:
        return "".join(piece.text for piece in self.answer)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns that need what earlier turns said."""

    turns: tuple[Turn, ...]
    system: str | None = None

    def messages(self) -> list[dict[str, str]]:
        """The form in which a chat API takes it, answers included."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            found.append({"role": "user", "content": turn.question})
            found.append({"role": "assistant", "content": turn.answer_text})
        return found


def recall(
    rng: Random, *, num_items: int, num_turns: int, held_out: bool, digit_share: float = 0.5
) -> Conversation:
    """A list of `key value` lines, then questions for values:

    a word, or in `digit_share` of the lines three digits.
    """
    table = _table(rng, num_items=num_items, held_out=held_out, digit_share=digit_share)
    turns = []
    for index in range(num_turns):
        asked = rng.sample(list(table), min(num_items, 1 if held_out else rng.choice((1, 1, 2, 4))))
        question = "\n".join(asked)
        if index == 0:
            question = f"Table:\n{_listing(table)}\nLook up:\n{question}"
        turns.append(Turn(question=question, answer=_recall_answer(asked, table)))
    return Conversation(turns=tuple(turns), system=_maybe_system(rng))


def shuffled(rng: Random, *, num_items: int, digit_share: float) -> Conversation:
    """A list, then all of it in another order:

    recall with an answer in every other token, for training only.
    """
    table = _table(rng, num_items=num_items, held_out=False, digit_share=digit_share)
    asked = rng.sample(list(table), num_items)
    turn = Turn(
        question=f"Table:\n{_listing(table)}\nShuffle.", answer=_recall_answer(asked, table, lead=False)
    )
    return Conversation(turns=(turn,))


def echo(rng: Random, *, num_words: int) -> Conversation:
    """A run of words, then pieces of it:

    the plainest form of copying by what stood before, for training only.
    """
    run = rng.sample(WORDS, num_words)
    pieces: list[Piece] = []
    for number in range(num_words // 4):
        length = rng.randint(2, min(6, num_words))
        start = rng.randrange(num_words - length + 1)
        pieces.append(Piece(text="\n" if number else ""))
        pieces.append(Piece(text=f" {run[start]}", learnt=False))
        pieces.append(
            Piece(text="".join(f" {word}" for word in run[start + 1 : start + length]), counts=True)
        )
    turn = Turn(question="Pieces of:\n" + "".join(f" {word}" for word in run), answer=tuple(pieces))
    return Conversation(turns=(turn,))


def _table(rng: Random, *, num_items: int, held_out: bool, digit_share: float) -> dict[str, str]:
    if not 1 <= num_items <= MAX_ITEMS:
        raise ValueError(f"num_items is {num_items}; a list has 1 to {MAX_ITEMS} items")
    words = rng.sample(WORDS, len(WORDS))
    keys, others = words[:num_items], words[num_items:]
    return {
        key: _value(rng, key, others, held_out=held_out, digits=rng.random() < digit_share) for key in keys
    }


def _value(rng: Random, key: str, others: list[str], *, held_out: bool, digits: bool) -> str:
    while True:
        value = "".join(rng.choices("0123456789", k=3)) if digits else rng.choice(others)
        if is_held_out(f"{key} {value}") is held_out:
            return value


def _listing(table: dict[str, str]) -> str:
    return "\n".join(f"{key} {value}" for key, value in table.items())


def _recall_answer(asked: list[str], table: dict[str, str], *, lead: bool = True) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    for number, key in enumerate(asked):
        pieces.append(Piece(text=f"\n{key}" if number else key, learnt=lead))
        pieces.append(Piece(text=f" {table[key]}", counts=True))
    return tuple(pieces)


def copy(rng: Random, *, num_words: int, held_out: bool) -> Conversation:
    """Random words and digits, to be repeated."""
    while True:
        joint = rng.choice(("\n", " ", ",", "+"))
        digits = rng.random() < 0.3
        text = joint.join(rng.choice("0123456789") if digits else rng.choice(WORDS) for _ in range(num_words))
        if is_held_out(text) is held_out:
            break
    turn = Turn(question=f"Repeat:\n{text}", answer=(Piece(text=text, counts=True),))
    return Conversation(turns=(turn,), system=_maybe_system(rng))


def arithmetic(rng: Random, *, num_turns: int, held_out: bool) -> Conversation:
    """Sums of two numbers below a hundred; in training several to a turn."""
    turns = []
    for _ in range(num_turns):
        sums = [_sum(rng, held_out=held_out) for _ in range(1 if held_out else rng.randint(1, 4))]
        pieces: list[Piece] = []
        for number, (left, right) in enumerate(sums):
            lead = "\n" if number else ""
            pieces += [Piece(text=f"{lead}{left}+{right}="), Piece(text=str(left + right), counts=True)]
        question = "Add:\n" + "\n".join(f"{left}+{right}" for left, right in sums)
        turns.append(Turn(question=question, answer=tuple(pieces)))
    return Conversation(turns=tuple(turns), system=_maybe_system(rng))


def _sum(rng: Random, *, held_out: bool) -> tuple[int, int]:
    while True:
        limit = rng.choice((10, 100))
        left, right = rng.randrange(limit), rng.randrange(limit)
        if is_held_out(f"{left}+{right}") is held_out:
            return left, right


def json_object(rng: Random, *, num_turns: int, held_out: bool) -> Conversation:
    """Fields to be written as a JSON object: words become strings, numbers and yes/no their JSON values."""
    turns = []
    for _ in range(num_turns):
        while True:
            fields = {name: _json_value(rng) for name in rng.sample(WORDS, rng.randint(1, 4))}
            question = "JSON:\n" + "\n".join(f"{name}={_plain(value)}" for name, value in fields.items())
            if is_held_out(question) is held_out:
                break
        turns.append(Turn(question=question, answer=(Piece(text=json.dumps(fields), counts=True),)))
    return Conversation(turns=tuple(turns), system=_maybe_system(rng))


def _json_value(rng: Random) -> str | int | bool:
    kind = rng.randrange(5)
    if kind < 2:
        return rng.choice(WORDS)
    return rng.randrange(1000) if kind < 4 else rng.random() < 0.5


def _plain(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _maybe_system(rng: Random) -> str | None:
    return SYSTEM_PROMPT if rng.random() < 0.05 else None


def training_conversation(rng: Random, kind: str, *, num_tokens: int) -> Conversation:
    """A conversation of `kind` (a key of TRAINING_KINDS) that takes about `num_tokens` tokens."""
    return TRAINING_KINDS[kind](rng, num_tokens)


def _training_recall(rng: Random, num_tokens: int) -> Conversation:
    digit_share, item = _draw_values(rng)
    most = min(int(num_tokens * 0.75 / item), MAX_ITEMS)
    num_items = rng.randint(max(2, most // 3), max(3, most))
    num_turns = max(
        2, int(num_tokens - num_items * item) // 12
    )  # a turn takes 9 to 30 tokens; the rest is cut
    return recall(rng, num_items=num_items, num_turns=num_turns, held_out=False, digit_share=digit_share)


def _training_shuffled(rng: Random, num_tokens: int) -> Conversation:
    digit_share, item = _draw_values(rng)
    most = min(int(num_tokens * 0.45 / item), MAX_ITEMS)
    return shuffled(rng, num_items=rng.randint(max(2, most // 2), max(3, most)), digit_share=digit_share)


def _training_echo(rng: Random, num_tokens: int) -> Conversation:
    most = min(num_tokens // 2, MAX_ITEMS)
    return echo(rng, num_words=rng.randint(max(4, most // 3), most))


def _draw_values(rng: Random) -> tuple[float, float]:
    """A share of numbers among the values, and the tokens that an item then takes."""
    digit_share = rng.choice((0.0, 0.5, 0.5, 1.0))
    return digit_share, WORD_ITEM_TOKENS + digit_share * (DIGIT_ITEM_TOKENS - WORD_ITEM_TOKENS)


def _training_copy(rng: Random, num_tokens: int) -> Conversation:
    most = num_tokens // 4
    return copy(rng, num_words=rng.randint(max(2, most // 3), most), held_out=False)


def _training_arithmetic(rng: Random, num_tokens: int) -> Conversation:
    return arithmetic(rng, num_turns=max(1, num_tokens // 30), held_out=False)


def _training_json(rng: Random, num_tokens: int) -> Conversation:
    return json_object(rng, num_turns=max(1, num_tokens // 60), held_out=False)


TRAINING_KINDS: dict[str, Callable[[Random, int], Conversation]] = {
    "recall": _training_recall,
    "shuffled": _training_shuffled,
    "echo": _training_echo,
    "copy": _training_copy,
    "arithmetic": _training_arithmetic,
    "json": _training_json,
}
