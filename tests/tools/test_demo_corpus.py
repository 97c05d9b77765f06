import pytest

from tools.demo_corpus import MIN_CHARACTERS, load_documents


@pytest.fixture(scope="module")
def sides() -> tuple[list[str], list[str]]:
    return load_documents(held_out=False), load_documents(held_out=True)


def test_no_document_is_on_both_sides_or_twice_on_one(sides: tuple[list[str], list[str]]) -> None:
    learnt, held_out = sides
    assert len({*learnt, *held_out}) == len(learnt) + len(held_out)


def test_about_a_tenth_is_held_out(sides: tuple[list[str], list[str]]) -> None:
    learnt, held_out = sides
    assert 0.05 < len(held_out) / len(learnt) < 0.2


def test_documents_are_long_enough_to_say_something(sides: tuple[list[str], list[str]]) -> None:
    assert min(len(document) for side in sides for document in side) >= MIN_CHARACTERS
