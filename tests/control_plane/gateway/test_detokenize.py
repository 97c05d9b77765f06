import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from control_plane.gateway.detokenize import ByteDetokenizer, Detokenizer, WindowDetokenizer, detokenizer_for
from control_plane.gateway.tokenizer import BYTE_OF_CHAR, TextTokenizer

TEXT = "Water 水, naïve 😀👩‍👩‍👧 — е́ and \u0301 alone; the wheel."
WORDS = ["▁the", "▁wheel", "▁", "a", "b", "naï", "ve", "水"]
TOKENS = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]


def joined(detokenizer: Detokenizer, token_ids: list[int], cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(token_ids) + 1) for cut in cuts), len(token_ids)]
    deltas = [detokenizer.push(token_ids[a:b]) for a, b in pairwise(edges)]
    return [*deltas, detokenizer.flush()]


@pytest.fixture(scope="session")
def byte_fallback_tokenizer() -> TextTokenizer:
    """As in Llama 2 and Mistral: words with a blank mark, and single bytes for the rest."""
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<s>"])
    return TextTokenizer(tokenizer)


@settings(max_examples=200)
@given(data=st.data())
def test_any_tokens_in_any_chunks_join_to_the_whole_decoding(
    tokenizer: TextTokenizer, data: st.DataObject
) -> None:
    ids = st.integers(0, tokenizer.vocab_size + 5)
    token_ids = data.draw(st.lists(ids, max_size=40))
    cuts = data.draw(st.lists(st.integers(0, 100), max_size=20))
    whole = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert "".join(joined(ByteDetokenizer(tokenizer), token_ids, cuts)) == whole


@given(cuts=st.lists(st.integers(0, 1000), max_size=60), text=st.text(max_size=40))
def test_a_character_is_never_split(tokenizer: TextTokenizer, cuts: list[int], text: str) -> None:
    token_ids = tokenizer.encode(TEXT + text, add_special_tokens=False)
    deltas = joined(ByteDetokenizer(tokenizer), token_ids, cuts)
    assert "\N{REPLACEMENT CHARACTER}" in text or not any(
        "\N{REPLACEMENT CHARACTER}" in delta for delta in deltas
    )


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character(tokenizer: TextTokenizer) -> None:
    token_ids = tokenizer.encode("ok 😀", add_special_tokens=False)[:-1]
    detokenizer = ByteDetokenizer(tokenizer)
    assert detokenizer.push(token_ids) == "ok "
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"


@given(
    cuts=st.lists(st.integers(0, 100), max_size=30),
    parts=st.lists(st.sampled_from([*WORDS, "😀", "é", "<s>"]), max_size=20),
)
def test_byte_fallback_tokens_join_to_the_whole_decoding(
    byte_fallback_tokenizer: TextTokenizer, cuts: list[int], parts: list[str]
) -> None:
    tokenizer = byte_fallback_tokenizer
    token_ids: list[int] = []
    for part in parts:
        token_ids += [TOKENS.index(part)] if part in TOKENS else [byte + 1 for byte in part.encode()]
    deltas = joined(WindowDetokenizer(tokenizer), token_ids, cuts)
    assert "".join(deltas) == tokenizer.decode(token_ids, skip_special_tokens=True)
    assert not any("\N{REPLACEMENT CHARACTER}" in delta for delta in deltas)


def test_bytes_that_never_become_a_character_do_not_hold_text_back(
    byte_fallback_tokenizer: TextTokenizer,
) -> None:
    detokenizer = WindowDetokenizer(byte_fallback_tokenizer)
    text = "".join(detokenizer.push([0xFF + 1]) for _ in range(40))
    assert len(text) >= 36


def test_the_tokenizers_kind_chooses_the_detokenizer(
    tokenizer: TextTokenizer, byte_fallback_tokenizer: TextTokenizer
) -> None:
    assert isinstance(detokenizer_for(tokenizer), ByteDetokenizer)
    assert isinstance(detokenizer_for(byte_fallback_tokenizer), WindowDetokenizer)


def test_token_bytes_join_to_the_text(
    tokenizer: TextTokenizer, byte_fallback_tokenizer: TextTokenizer
) -> None:
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(i) for i in token_ids).decode() == TEXT
    assert byte_fallback_tokenizer.token_bytes(0xE6 + 1) == b"\xe6"
    assert byte_fallback_tokenizer.token_bytes(257) == b" the"
    assert tokenizer.token_bytes(10**6) == b""


def test_other_threads_go_on_while_a_long_text_is_tokenized(tokenizer: TextTokenizer) -> None:
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks[0] += 1

    with ThreadPoolExecutor(1) as pool:
        ticking = pool.submit(tick)
        before = ticks[0]
        tokenizer.encode("wheel " * 200_000, add_special_tokens=False)
        during = ticks[0] - before
        stop.set()
        ticking.result()
    assert during > 10  # a held interpreter lock leaves a tick at either end


@given(st.text(alphabet=st.sampled_from("wheel \n\u0301é日😀<eos>")))
def test_a_text_has_no_fewer_tokens_than_foretold(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_normalization_is_foretold_too(normalizer: normalizers.Normalizer | None) -> None:
    plain = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(BYTE_OF_CHAR)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    if normalizer is not None:
        plain.normalizer = normalizer
    tokenizer = TextTokenizer(plain)
    for text in ("\u1100\u1161\u11a8" * 9, "\u03b1\u0313\u0300\u0345" * 9, "x" * 9):
        assert 0 < tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))
