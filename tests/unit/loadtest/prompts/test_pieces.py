"""The cache of pieces forgets what was not used for longest, and never holds more than it may."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loadtest.prompts.pieces import Piece, PieceCache, ids_piece, join, text_piece


def piece(num_bytes: int) -> Piece:
    return Piece(b"", b"", b"x" * num_bytes)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_what_is_kept_is_the_last_that_fits(sizes: list[int]) -> None:
    cache = PieceCache(100)
    made: list[int] = []

    def get(number: int) -> Piece:
        def make() -> Piece:
            made.append(number)
            return piece(sizes[number])

        return cache.get(number, make)

    assert [get(number) for number in range(len(sizes))] == [piece(size) for size in sizes]
    made.clear()
    fitting = next((n for n in range(len(sizes)) if sum(sizes[n:]) <= 100), len(sizes))
    for number in range(fitting, len(sizes)):
        get(number)
    assert made == []
    if fitting:
        get(fitting - 1)
        assert made == [fitting - 1]


def test_what_is_used_stays() -> None:
    cache = PieceCache(100)
    for number in range(20):
        cache.get("used", lambda: piece(40))
        cache.get(number, lambda: piece(40))
    assert cache.get("used", lambda: piece(1)) == piece(40)


def test_what_is_larger_than_the_cache_is_made_and_not_kept() -> None:
    cache = PieceCache(10)
    assert cache.get("large", lambda: piece(11)) == piece(11)
    assert cache.get("large", lambda: piece(12)) == piece(12)


def test_empty_pieces_leave_no_separator() -> None:
    assert join([ids_piece([]), ids_piece([1, 2]), ids_piece([]), ids_piece([3])]) == b"1,2,3"
    assert join([text_piece("a"), text_piece("", separator=""), text_piece('"b"', separator="\n")]) == b'a\\n\\"b\\"'
    assert join([]) == b""
