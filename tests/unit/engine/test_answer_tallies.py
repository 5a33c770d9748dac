"""Tallies of answers: by the length of the prompt, and added up over both sides of a worker."""

from __future__ import annotations

from contracts.messages import AnswerTally
from engine.answer_tallies import AnswerTallies
from engine.sequence import Sequence
from tests.support.roles import generate


def sequence(prompt: int, output: int) -> Sequence:
    request = generate(prompt=prompt)
    return Sequence(sequence_id=0, request=request, deadline_s=1.0, token_ids=[*request.token_ids, *range(output)])


def test_answers_of_similar_prompts_count_together_and_sides_are_added_up() -> None:
    one, other = AnswerTallies(), AnswerTallies()
    assert one.report(other) == ()
    one.add(sequence(1, 5))
    one.add(sequence(4, 2))
    other.add(sequence(7, 1))
    other.add(sequence(8, 3))
    assert one.report() == (AnswerTally(0, 0), AnswerTally(1, 5), AnswerTally(0, 0), AnswerTally(1, 2))
    both = (AnswerTally(0, 0), AnswerTally(1, 5), AnswerTally(0, 0), AnswerTally(2, 3), AnswerTally(1, 3))
    assert one.report(other) == other.report(one) == both
