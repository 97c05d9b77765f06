"""The served model's tokenizer: text to token ids and back, and the bytes of single tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# How many times shorter a normalizer can make a text in UTF-8. NFC: three jamo of three bytes become one syllable of
# three.
_MOST_SHRINKING = {None: 1, "NFC": 3}


class TextTokenizer:
    """A `tokenizers.Tokenizer` with what a gateway asks of it. Safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Some tokenizer.json files carry the settings of a training run.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.is_byte_level = _decoder_types(tokenizer) - {"Sequence", "Fuse"} == {"ByteLevel"}
        self.special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._pieces = [self._piece(token_id) for token_id in range(self.vocab_size)]
        self._most_bytes_per_token = self._text_bytes_of_a_token()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Special tokens written out in `text` become those tokens, as in transformers and vLLM.

        Other threads go on meanwhile: a batch releases the interpreter lock, which `Tokenizer.encode` holds.
        """
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        token_ids: list[int] = encoding.ids
        return token_ids

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of `text`, at once; 0 where this tokenizer gives none."""
        if self._most_bytes_per_token is None:
            return 0
        return -(-len(text.encode()) // self._most_bytes_per_token)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary become nothing."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The token's share of the text's UTF-8 bytes, which may begin or end inside a character."""
        return self._pieces[token_id] if 0 <= token_id < self.vocab_size else b""

    def _text_bytes_of_a_token(self) -> int | None:
        """How many bytes of text one token can stand for; None if a token may swallow any number."""
        state = json.loads(self._tokenizer.to_str())
        swallows = any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"])
        normalizer = (state["normalizer"] or {}).get("type")
        if not self.is_byte_level or swallows or normalizer not in _MOST_SHRINKING:
            return None
        return max(map(len, self._pieces), default=1) * _MOST_SHRINKING[normalizer]

    def _piece(self, token_id: int) -> bytes:
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            if all(char in BYTE_OF_CHAR for char in token):
                return bytes(BYTE_OF_CHAR[char] for char in token)
            return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def load_tokenizer(model_path: Path) -> TextTokenizer:
    """Reads tokenizer.json. `ValueError` if the directory has none."""
    path = model_path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"no tokenizer.json in {model_path}: the gateway needs the model's fast tokenizer")
    return TextTokenizer(Tokenizer.from_file(str(path)))


def _decoder_types(tokenizer: Tokenizer) -> set[str]:
    decoder: dict[str, Any] | None = json.loads(tokenizer.to_str()).get("decoder")
    if decoder is None:
        return set()
    return {decoder["type"], *(part["type"] for part in decoder.get("decoders", ()))}


def _byte_of_char() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()
