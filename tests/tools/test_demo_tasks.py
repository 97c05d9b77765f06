import json
from random import Random

import pytest

from tools.demo_corpus import is_held_out
from tools.demo_tasks import (
    TRAINING_KINDS,
    Conversation,
    arithmetic,
    copy,
    json_object,
    recall,
    training_conversation,
)

SEEDS = range(30)


def _table(conversation: Conversation) -> dict[str, str]:
    listing = conversation.turns[0].question.removeprefix("Table:\n").partition("\nLook up:\n")[0]
    return dict(line.split(" ") for line in listing.split("\n"))


@pytest.mark.parametrize("kind", TRAINING_KINDS)
def test_the_same_seed_gives_the_same_conversation_and_another_seed_another(kind: str) -> None:
    one, same, other = (training_conversation(Random(seed), kind, num_tokens=200) for seed in (5, 5, 6))
    assert one == same
    assert one != other


@pytest.mark.parametrize("held_out", [False, True])
def test_recall_answers_with_the_lines_of_the_list_that_were_asked_for(held_out: bool) -> None:
    for seed in SEEDS:
        conversation = recall(Random(seed), num_items=20, num_turns=3, held_out=held_out)
        table = _table(conversation)
        assert len(table) == 20
        for turn in conversation.turns:
            asked = turn.question.rpartition("Look up:\n")[2].split("\n")
            assert turn.answer_text == "\n".join(f"{key} {table[key]}" for key in asked)


def test_no_pair_of_a_recall_list_is_on_both_sides_of_the_split() -> None:
    for held_out in (False, True):
        for seed in SEEDS:
            conversation = recall(Random(seed), num_items=20, num_turns=1, held_out=held_out)
            assert {is_held_out(f"{key} {value}") for key, value in _table(conversation).items()} == {
                held_out
            }


def test_a_list_longer_than_the_words_allow_is_refused() -> None:
    with pytest.raises(ValueError, match="10000"):
        recall(Random(0), num_items=10_000, num_turns=1, held_out=False)


@pytest.mark.parametrize("held_out", [False, True])
def test_sums_are_right_and_keep_to_their_side_of_the_split(held_out: bool) -> None:
    for seed in SEEDS:
        for turn in arithmetic(Random(seed), num_turns=3, held_out=held_out).turns:
            for question, answer in zip(
                turn.question.split("\n")[1:], turn.answer_text.split("\n"), strict=True
            ):
                left, right = map(int, question.split("+"))
                assert answer == f"{question}={left + right}"
                assert is_held_out(question) is held_out


@pytest.mark.parametrize("held_out", [False, True])
def test_json_answers_parse_to_the_fields_asked_for(held_out: bool) -> None:
    for seed in SEEDS:
        for turn in json_object(Random(seed), num_turns=2, held_out=held_out).turns:
            fields = [line.split("=") for line in turn.question.split("\n")[1:]]
            found = json.loads(turn.answer_text)
            plain = {True: "yes", False: "no"}
            shown = [
                [name, plain[value] if isinstance(value, bool) else str(value)]
                for name, value in found.items()
            ]
            assert shown == fields
            assert is_held_out(turn.question) is held_out


def test_copying_answers_with_the_text_that_was_given() -> None:
    for seed in SEEDS:
        turn = copy(Random(seed), num_words=12, held_out=seed % 2 == 0).turns[0]
        assert turn.question == f"Repeat:\n{turn.answer_text}"
        assert is_held_out(turn.answer_text) is (seed % 2 == 0)
