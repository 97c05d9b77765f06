from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from workers.engine.stop_strings import StopStrings
from workers.errors import CheckpointError
from workers.request import Request, RequestId, SamplingParams, SessionId

EOS = "<eos>"


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """Byte-level BPE with few merges: words and characters of several bytes span tokens."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[EOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the end of the story", "stop here and stop there", "\n\nuser:"] * 10, trainer
    )
    return tokenizer


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    """Words with a leading blank that decoding strips at the start of the text, as SentencePiece has it."""
    words = ["<unk>", "▁one", "▁two", "▁three", "▁", "o", "n", "e", "."]
    tokenizer = Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    return tokenizer


def token_of(tokenizer: Tokenizer, text: str) -> int:
    token_id = tokenizer.token_to_id(text)
    assert token_id is not None
    return token_id


def new_request(*stop_strings: str, min_tokens: int = 0) -> Request:
    return Request(
        request_id=RequestId("r"),
        session_id=SessionId(0),
        prompt_token_ids=[1],
        sampling=SamplingParams(max_tokens=1000, stop_strings=stop_strings, min_tokens=min_tokens),
        arrival_s=0.0,
    )


def run(tokenizer: Tokenizer, token_ids: list[int], request: Request) -> tuple[int, str] | None:
    """How many tokens it takes to the first stop string, and which that is."""
    finder = StopStrings(tokenizer)
    for token_id in token_ids:
        found = finder.find(request, token_id)
        request.output_token_ids.append(token_id)
        if found is not None:
            return len(request.output_token_ids), found
    return None


def first_stop(tokenizer: Tokenizer, token_ids: list[int], request: Request) -> tuple[int, str] | None:
    """The same by decoding everything again after every token."""
    num_before = 0
    for num in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:num])
        ended = [
            (start, -len(stop), stop)
            for stop in request.sampling.stop_strings
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > num_before
        ]
        if ended and num > request.sampling.min_tokens:
            return num, min(ended)[2]
        num_before = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    return None


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("This is the end of it", "end"),
        ("one\n\nuser: two", "\n\nuser:"),
        ("ein Käse", "äs"),
        ("日本語のテキスト", "語の"),
        ("smile 😀 now", "😀"),
        ("aaab", "aab"),
    ],
)
def test_a_stop_string_is_found_across_tokens_and_bytes(byte_level: Tokenizer, text: str, stop: str) -> None:
    token_ids = byte_level.encode(text).ids
    found = run(byte_level, token_ids, new_request(stop))
    assert found is not None
    num_tokens, found_string = found
    assert found_string == stop
    # Not a token too late: without the last one it is not there.
    assert stop in byte_level.decode(token_ids[:num_tokens])
    assert stop not in byte_level.decode(token_ids[: num_tokens - 1])


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(alphabet="abä😀\n ", max_size=40),
    stops=st.lists(st.text(alphabet="abä😀\n ", min_size=1, max_size=5), min_size=1, max_size=4),
    min_tokens=st.integers(0, 20),
)
def test_the_first_stop_string_is_that_of_the_whole_text(
    byte_level: Tokenizer, text: str, stops: list[str], min_tokens: int
) -> None:
    token_ids = byte_level.encode(text).ids
    request = new_request(*stops, min_tokens=min_tokens)
    assert run(byte_level, token_ids, request) == first_stop(byte_level, token_ids, request)


def test_of_several_that_one_token_completes_the_one_that_begins_first_counts(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("stop").ids
    found = run(byte_level, token_ids, new_request("op", "top", "stop"))
    assert found is not None
    assert found[1] in {"op", "top", "stop"}
    assert found == first_stop(byte_level, token_ids, new_request("op", "top", "stop"))


def test_what_ends_within_the_fewest_tokens_is_text_like_any_other(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("a.b.c.").ids
    assert run(byte_level, token_ids, new_request(".")) == (2, ".")
    assert run(byte_level, token_ids, new_request(".", min_tokens=2)) == (4, ".")
    assert run(byte_level, token_ids, new_request(".", min_tokens=5)) == (6, ".")
    assert run(byte_level, token_ids, new_request(".", min_tokens=6)) is None


def test_special_tokens_have_no_text(byte_level: Tokenizer) -> None:
    (a, b), eos = byte_level.encode("a!").ids, token_of(byte_level, EOS)
    assert run(byte_level, [a, eos, b], new_request("a!")) == (3, "a!")
    assert run(byte_level, [a, eos, b], new_request(EOS)) is None


def test_blanks_between_words_are_text_and_the_first_one_is_not(metaspace: Tokenizer) -> None:
    ids = [token_of(metaspace, word) for word in ("▁one", "▁two", ".", "▁three")]
    assert metaspace.decode(ids) == "one two. three"
    assert run(metaspace, ids, new_request(" one")) is None
    assert run(metaspace, ids, new_request(" two")) == (2, " two")
    assert run(metaspace, ids, new_request("two. t")) == (4, "two. t")


def test_bytes_that_are_no_character_do_not_hide_what_follows(byte_level: Tokenizer) -> None:
    lone_byte = byte_level.encode("😀").ids[0]
    token_ids = [lone_byte] * 11 + byte_level.encode(" stop").ids
    found = run(byte_level, token_ids, new_request("stop"))
    assert found is not None
    assert found == (len(token_ids), "stop")


def test_a_search_goes_on_after_a_move_and_after_a_repeated_step(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("This is the end of it").ids
    expected = run(byte_level, token_ids, new_request("end o"))
    assert expected is not None
    request = new_request("end o")
    for num, token_id in enumerate(token_ids, start=1):
        finder = StopStrings(byte_level)  # another worker
        assert finder.find(request, byte_level.encode("x").ids[0]) is None  # a step whose result was lost
        found = finder.find(request, token_id)
        assert (found is not None) == (num == expected[0])
        if found is not None:
            break
        request.output_token_ids.append(token_id)


def test_a_request_with_the_id_of_a_forgotten_one_starts_anew(byte_level: Tokenizer) -> None:
    finder = StopStrings(byte_level)
    a, b = byte_level.encode("ab").ids
    request = new_request("ab")
    assert finder.find(request, a) is None
    finder.forget(request.request_id)
    assert finder.find(new_request("ab"), b) is None


@pytest.mark.parametrize("content", [None, "", "{}", '{"version": "1.0"}'])
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        StopStrings(path)


def test_a_tokenizer_is_read_from_its_file(tmp_path: Path, byte_level: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    byte_level.save(str(path))
    a, b = byte_level.encode("ab").ids
    request = new_request("ab")
    request.output_token_ids.append(a)
    assert StopStrings(path).find(request, b) == "ab"
