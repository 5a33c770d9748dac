"""Stop strings found across pieces as a naive search in the whole text finds them."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gateway.stop_strings import StopMatcher

TEXTS = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4).map(tuple)


def feed_until_match(matcher: StopMatcher, text: str, cuts: list[int]) -> tuple[str, str | None]:
    """The text given out over pieces cut at `cuts`, and the stop string that ended it."""
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    out = ""
    for start, stop in itertools.pairwise(edges):
        released = matcher.feed(text[start:stop])
        out += released.text
        if released.matched is not None:
            return out, released.matched
    return out + matcher.flush(), None


def naive(text: str, stops: tuple[str, ...], *, include_match: bool) -> tuple[str, str | None]:
    """Reads character by character: the first stop string that is complete ends it."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include_match else end - len(stop)], stop
    return text, None


@given(text=TEXTS, stops=STOPS, cuts=st.lists(st.integers(0, 30)), include=st.booleans())
def test_however_the_text_is_cut_the_result_is_that_of_the_naive_search(
    text: str, stops: tuple[str, ...], cuts: list[int], include: bool
) -> None:
    matcher = StopMatcher(stops, include_match=include)
    assert feed_until_match(matcher, text, cuts) == naive(text, stops, include_match=include)


@given(text=TEXTS, stops=STOPS, cuts=st.lists(st.integers(0, 30)))
def test_no_more_is_held_than_may_begin_a_stop_string(text: str, stops: tuple[str, ...], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    given_out = ""
    for end, character in enumerate(text, 1):
        released = matcher.feed(character)
        given_out += released.text
        if released.matched:
            return
        held = text[len(given_out) : end]
        assert any(stop.startswith(held) for stop in stops) or not held


def test_earliest_match_wins() -> None:
    assert StopMatcher(("lo w", "el")).feed("hello world").text == "h"
    assert StopMatcher(("hello w", "el")).feed("hello world").text == "h"


def test_text_is_given_out_when_it_turns_out_not_to_stop() -> None:
    matcher = StopMatcher(("END",))
    assert [matcher.feed(piece).text for piece in ("a E", "N", "x")] == ["a ", "", "ENx"]
