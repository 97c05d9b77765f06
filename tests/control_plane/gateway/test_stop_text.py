from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from control_plane.gateway.stop_text import StopText

TEXTS = st.text(alphabet="abc", max_size=40)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple)


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:stop] for start, stop in pairwise(edges)]


CUTS = st.lists(st.integers(0, 100), max_size=12)


@given(text=TEXTS, stops=STOPS, cuts=CUTS)
def test_without_a_stop_all_text_comes_out_in_order(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    *parts, last = pieces(text, cuts)
    stop_text = StopText(stops)
    assert "".join(stop_text.push(part) for part in parts) + stop_text.finish(last, stopped=False) == text


@given(text=TEXTS, stops=STOPS, cuts=CUTS)
def test_exactly_the_longest_tail_that_could_begin_a_stop_string_is_withheld(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    stop_text = StopText(stops)
    released = "".join(stop_text.push(part) for part in pieces(text, cuts))
    tails = [text[start:] for start in range(len(text))]
    longest = max((len(t) for t in tails for stop in stops if stop != t and stop.startswith(t)), default=0)
    assert released == text[: len(text) - longest]


@given(text=TEXTS, stops=STOPS, cuts=CUTS)
def test_nothing_at_or_after_the_first_stop_string_ever_comes_out(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    # A worker ends with the token that completes a stop string; the token may go on after it.
    parts, stop_text, seen, released = pieces(text, cuts), StopText(stops), "", ""
    for part in parts:
        seen += part
        if any(stop in seen for stop in stops):
            released += stop_text.finish(part, stopped=True)
            assert released == seen[: min(seen.find(stop) for stop in stops if stop in seen)]
            return
        released += stop_text.push(part)
    assert seen.startswith(released)


def test_text_without_stop_strings_passes_at_once() -> None:
    stop_text = StopText(())
    assert stop_text.push("abc") == "abc"
    assert stop_text.finish("d", stopped=False) == "d"
