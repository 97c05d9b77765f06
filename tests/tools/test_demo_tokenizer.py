import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tools.demo_rows import Encoder
from tools.demo_tasks import WORDS, Conversation, Piece, Turn
from tools.demo_tokenizer import PRE_TOKENS, SPECIAL_TOKENS, VOCAB_SIZE

MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def shipped() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def test_every_byte_has_a_token_of_its_own() -> None:
    assert TOKENIZER.get_vocab_size() == VOCAB_SIZE
    for code in range(0x800):  # their UTF-8 forms use every continuation byte and many leading ones
        assert TOKENIZER.decode(TOKENIZER.encode(chr(code)).ids) == chr(code)


def test_the_shipped_tokenizer_splits_text_as_the_trainer_does() -> None:
    state = json.loads(TOKENIZER.to_str())
    assert state["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": PRE_TOKENS}


@given(st.text(alphabet=st.sampled_from("a. \n\r\t\u3000"), max_size=40))
def test_runs_of_blanks_split_as_if_tried_at_every_blank(text: str) -> None:
    plain = Regex(PRE_TOKENS.replace("(?<! )", ""))
    split = pre_tokenizers.Split(plain, behavior="isolated").pre_tokenize_str(text)
    assert pre_tokenizers.Split(Regex(PRE_TOKENS), behavior="isolated").pre_tokenize_str(text) == split


@given(st.text())
def test_any_text_survives_the_round_trip(text: str) -> None:
    if not any(special in text for special in SPECIAL_TOKENS):
        assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@given(st.text(alphabet=st.sampled_from("ab 1.\n\r\t="), max_size=40))
def test_text_encoded_line_by_line_is_text_encoded_at_once(text: str) -> None:
    assert Encoder(TOKENIZER).encode(text) == TOKENIZER.encode(text).ids


def test_every_word_of_the_tasks_is_one_token_with_and_without_a_blank() -> None:
    assert all(
        len(TOKENIZER.encode(word).ids) == len(TOKENIZER.encode(f" {word}").ids) == 1 for word in WORDS
    )


def test_digits_are_tokens_one_by_one() -> None:
    assert len(TOKENIZER.encode("1234567").ids) == 7


def test_training_sees_the_very_tokens_that_the_chat_template_writes(
    shipped: PreTrainedTokenizerBase,
) -> None:
    pieces = (Piece(text="value"), Piece(text=" 117", counts=True))
    turns = (
        Turn(question="Table:\nvalue 117\nLook up:\nvalue", answer=pieces),
        Turn(question="value", answer=pieces),
    )
    conversation = Conversation(turns=turns, system="Be brief.")
    templated = shipped.apply_chat_template(conversation.messages(), tokenize=True, return_dict=False)
    assert Encoder(TOKENIZER).conversation(conversation)[0] == templated


def test_the_template_asks_for_an_answer_and_refuses_an_unknown_role(
    shipped: PreTrainedTokenizerBase,
) -> None:
    messages = [{"role": "user", "content": "value"}]
    text = shipped.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|endoftext|><|user|>value<|end|><|assistant|>"
    assert shipped.eos_token == "<|end|>"
    with pytest.raises(Exception, match="the roles are"):
        shipped.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)
