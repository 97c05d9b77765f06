"""Token ids to text, a few at a time, without ever splitting a character."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from control_plane.gateway.tokenizer import REPLACEMENT, TextTokenizer

# A character has at most four bytes, so at most three tokens can wait for its last one; a longer wait is for no valid
# character.
_MAX_PENDING_TOKENS = 4


class Detokenizer(Protocol):
    """Text so far, joined, equals the decoding of all tokens so far once `flush` has been called."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The characters that these tokens complete."""
        ...

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character."""
        ...


def detokenizer_for(tokenizer: TextTokenizer) -> Detokenizer:
    """Special tokens are left out of the text by all detokenizers."""
    return ByteDetokenizer(tokenizer) if tokenizer.is_byte_level else WindowDetokenizer(tokenizer)


class ByteDetokenizer:
    """For byte-level BPE: tokens are bytes, and an incremental UTF-8 decoder does the rest.

    Exact for any sequence of tokens.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        tokenizer = self._tokenizer
        return self._decoder.decode(
            b"".join([tokenizer.token_bytes(i) for i in token_ids if i not in tokenizer.special_ids])
        )

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For the other tokenizers, whose text of a token depends on its neighbours: decodes a short window before and
    after.

    The window holds the tokens last turned into text and the pending ones after them. Exact for tokens that spell
    valid UTF-8; among tokens
    that do not, the number of U+FFFD may differ from decoding all at once, because some tokenizers replace whole runs
    of bytes.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._done: list[int] = []
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        parts = []
        for token_id in token_ids:
            if token_id in self._tokenizer.special_ids:
                continue
            self._pending.append(token_id)
            text = self._pending_text()
            if text == "":  # a blank that is stripped at the very start, or no token at all
                self._done, self._pending = self._done or self._pending, []
            elif not text.endswith(REPLACEMENT) or len(self._pending) >= _MAX_PENDING_TOKENS:
                parts.append(text)
                self._done, self._pending = self._pending, []
        return "".join(parts)

    def flush(self) -> str:
        text = self._pending_text() if self._pending else ""
        self._done, self._pending = self._pending, []
        return text

    def _pending_text(self) -> str:
        decode = self._tokenizer.decode
        before = decode(self._done, skip_special_tokens=True)
        return decode(self._done + self._pending, skip_special_tokens=True)[len(before) :]
