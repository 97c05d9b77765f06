"""Keeps text that may turn out to be a stop string away from the client."""


class StopText:
    """Releases generated text except its longest tail that could begin a stop string.

    The worker decides where a generation ends; this class only makes sure that nothing at or after the stop string
    has been sent by then.
    One Knuth-Morris-Pratt automaton per stop string: constant amortised work per character whatever the strings'
    lengths.
    """

    def __init__(self, stop_strings: tuple[str, ...]) -> None:
        self._matchers = tuple(_PrefixMatcher(stop) for stop in stop_strings)
        self._withheld = ""

    def push(self, text: str) -> str:
        """New text in, text that is safe to send out."""
        if not self._matchers:
            return text
        pending = self._withheld + text
        num_withheld = max(matcher.advance(text) for matcher in self._matchers)
        released = pending[: len(pending) - num_withheld]
        self._withheld = pending[len(pending) - num_withheld :]
        return released

    def finish(self, text: str, *, stopped: bool) -> str:
        """The last text in; out comes all that is left, up to the first stop string if one ended the generation."""
        rest = self._withheld + text
        self._withheld = ""
        if not stopped:
            return rest
        found = [position for matcher in self._matchers if (position := rest.find(matcher.pattern)) >= 0]
        return rest[: min(found, default=len(rest))]


class _PrefixMatcher:
    """Tracks how long a proper prefix of `pattern` the text seen so far ends with."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self._borders = _borders(pattern)
        self._num_matched = 0

    def advance(self, text: str) -> int:
        num_matched = self._num_matched
        pattern, borders = self.pattern, self._borders
        for char in text:
            while num_matched and char != pattern[num_matched]:
                num_matched = borders[num_matched - 1]
            if char == pattern[num_matched]:
                num_matched += 1
            # A whole match that did not end the generation (below min_tokens) is text like any other.
            if num_matched == len(pattern):
                num_matched = borders[-1]
        self._num_matched = num_matched
        return num_matched


def _borders(pattern: str) -> list[int]:
    """For every prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders
