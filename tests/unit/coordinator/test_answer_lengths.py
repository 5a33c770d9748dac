"""How long answers get, by what workers told."""

from __future__ import annotations

import pytest

from contracts.messages import AnswerTally
from coordinator.answer_lengths import AnswerLengths


def tallies(bucket: int, answers: int, tokens: int) -> tuple[AnswerTally, ...]:
    return (*(AnswerTally(0, 0) for _ in range(bucket)), AnswerTally(answers, tokens))


def test_the_first_guess_is_bounded_by_what_is_allowed() -> None:
    lengths = AnswerLengths()
    assert lengths.expected(100, 40) == 40
    assert lengths.expected(100, 4000) == 256
    assert lengths.expected(100, 0) == 1


def test_means_by_length_of_the_prompt() -> None:
    lengths = AnswerLengths()
    lengths.ended(tallies(7, 1000, 50_000), ())
    lengths.ended(tallies(12, 1000, 400_000), ())
    assert lengths.expected(100, 4000) == pytest.approx(50, rel=0.05)
    assert lengths.expected(4000, 4000) == pytest.approx(400, rel=0.05)
    assert lengths.expected(10, 4000) == pytest.approx(225, rel=0.05), "nothing is known of these: the mean over all"
    assert lengths.expected(4000, 64) == 64


def test_tallies_count_from_a_workers_start() -> None:
    lengths = AnswerLengths()
    first, later = tallies(7, 100, 5_000), tallies(7, 200, 10_000)
    lengths.ended(first, ())
    lengths.ended(later, first)
    once = AnswerLengths()
    once.ended(later, ())
    assert lengths.expected(100, 4000) == once.expected(100, 4000)


@pytest.mark.parametrize("now", [tallies(7, 50, 9_000), tallies(7, 300, 100), tallies(7, 150, 5_010)])
def test_tallies_that_make_no_sense_tell_nothing(now: tuple[AnswerTally, ...]) -> None:
    lengths, before = AnswerLengths(), tallies(7, 100, 5_000)
    lengths.ended(before, ())
    expected = lengths.expected(100, 4000)
    lengths.ended(now, before)
    assert lengths.expected(100, 4000) == expected


def test_old_answers_fade() -> None:
    lengths = AnswerLengths()
    told = (0, 0)
    for tokens in (50, 500):
        for _ in range(200):
            before = tallies(7, *told)
            told = (told[0] + 100, told[1] + 100 * tokens)
            lengths.ended(tallies(7, *told), before)
    assert lengths.expected(100, 4000) == pytest.approx(500, rel=0.05)


def test_absurd_lengths_are_no_error() -> None:
    lengths = AnswerLengths()
    lengths.ended(tuple(AnswerTally(1, 2**70) for _ in range(200)), ())
    assert lengths.expected(2**90, 2**80) <= 2**80
