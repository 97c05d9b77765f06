"""Finds stop strings in generated text as it grows. Only requests that have any are turned into text here."""

from pathlib import Path

from tokenizers import Tokenizer

from workers.errors import CheckpointError
from workers.request import Request, RequestId

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes; tokens that do not make one by then never will.
_MAX_PENDING_TOKENS = 4


class StopStrings:
    """Called from one thread at a time. Its only state is a cache over the output tokens of requests.

    A stop string may begin and end anywhere, across tokens and inside of them. It counts if it is completed
    by a token after the first `min_tokens`. Special tokens have no text.
    """

    def __init__(self, tokenizer: Path | Tokenizer) -> None:
        """Raises `CheckpointError` if a path is given and there is no tokenizer."""
        self._tokenizer = _load(tokenizer) if isinstance(tokenizer, Path) else tokenizer
        self._searches: dict[RequestId, _Search] = {}

    def find(self, request: Request, new_token_id: int) -> str | None:
        """The stop string that `new_token_id`, not yet among the request's output, completes; None if it does
        not.

        Of several, the one that begins first, and the longest among those: the most text that must not be
        shown.
        """
        search = self._searches.get(request.request_id)
        # A draw may be repeated (the step was recomputed), so what was searched must be exactly the known
        # output.
        if search is None or not search.follows(request):
            search = self._searches[request.request_id] = _Search(self._tokenizer, request)
        return search.push(new_token_id)

    def forget(self, request_id: RequestId) -> None:
        """Drops what is cached of a request; without effect if nothing is."""
        self._searches.pop(request_id, None)


class _Search:
    """The tail of a request's text that a stop string could begin in, and the tokens that are no text yet."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self._stop_strings = request.sampling.stop_strings
        self._num_tail_chars = max(map(len, self._stop_strings)) - 1
        self._num_tokens = 0
        self._tail = ""
        # Text of a token may depend on its neighbours (a blank before a word), so the last tokens that became
        # text are decoded again before those that did not.
        self._done: list[int] = []
        self._pending: list[int] = []
        for token_id in request.output_token_ids:
            self.push(token_id)

    def follows(self, request: Request) -> bool:
        return self._request is request and self._num_tokens == len(request.output_token_ids)

    def push(self, token_id: int) -> str | None:
        self._num_tokens += 1
        new_text = self._text_of(token_id)
        text = self._tail + new_text
        num_searched = len(self._tail)
        self._tail = text[max(0, len(text) - self._num_tail_chars) :]
        if not new_text or self._num_tokens <= self._request.sampling.min_tokens:
            return None
        found = []
        for stop_string in self._stop_strings:
            # Begins early enough to end in the new text: what ended before was found or suppressed before.
            position = text.find(stop_string, max(0, num_searched - len(stop_string) + 1))
            if position >= 0:
                found.append((position, -len(stop_string), stop_string))
        return min(found)[2] if found else None

    def _text_of(self, token_id: int) -> str:
        """The characters that this token completes."""
        self._pending.append(token_id)
        before = self._tokenizer.decode(self._done, skip_special_tokens=True)
        text: str = self._tokenizer.decode(self._done + self._pending, skip_special_tokens=True)[
            len(before) :
        ]
        if not text:
            # A special token, or a blank that is stripped at the very start.
            self._done, self._pending = self._done or self._pending, []
            return ""
        if text.endswith(_REPLACEMENT) and len(self._pending) < _MAX_PENDING_TOKENS:
            return ""
        self._done, self._pending = self._pending, []
        return text


def _load(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise CheckpointError(f"{path} is not a readable tokenizer.json: {error}") from error
