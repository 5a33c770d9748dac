"""Whatever the load: what pairing never does, and that it comes to an end."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.policy.migration_pairs import pair
from coordinator.policy.move_round import Round
from coordinator.policy.move_terms import MoveHistory, MoveRules
from coordinator.policy.virtual_usage import UsageRules
from tests.support.moving_fleet import Answer, Worker, carry_out, view_of

#: No cooldown, and no history: nothing but the conditions themselves keeps answers from going to and fro.
_RULES = MoveRules(
    usage=UsageRules(headroom_tokens={1: 160}, growth_tokens=32),
    low_tokens=64,
    high_tokens=160,
    max_moving=2,
    max_moving_draining=4,
    max_moving_total=5,
    cooldown_s=0.0,
)

_ANSWERS = st.lists(st.builds(Answer, st.integers(-1, 2), st.integers(1, 30)), max_size=20)
_WORKERS = st.lists(st.builds(Worker, st.just(200), _ANSWERS), min_size=1, max_size=6)


def _fitting(workers: list[Worker], draining: list[bool]) -> list[Worker]:
    """With as many answers as their blocks hold."""
    for worker, drains in zip(workers, draining, strict=False):
        while worker.available_blocks < 0:
            worker.answers.pop()
        worker.is_draining = drains
    return workers


def _least(workers: list[Worker]) -> float:
    """How the fullest of those that do not drain stands."""
    look = Round(view_of(workers), _RULES, MoveHistory(), 0.0)
    stands = [stand for stand, worker in zip(look.pressed().tolist(), workers, strict=True) if not worker.is_draining]
    return min(stands, default=0.0)


@settings(max_examples=200)
@given(workers=_WORKERS, draining=st.lists(st.booleans(), min_size=6, max_size=6), rules=st.sampled_from([1, 2, 5]))
def test_bounds_and_directions(workers: list[Worker], draining: list[bool], rules: int) -> None:
    bounds = replace(_RULES, max_moving=1, max_moving_draining=rules, max_moving_total=rules)
    found = pair(view_of(_fitting(workers, draining)), bounds, MoveHistory(), 0.0)
    givers = {move.source for move in found.moves}
    takers = {move.destination for move in found.moves}
    assert not givers & takers
    assert sum(move.max_requests for move in found.moves) <= bounds.max_moving_total
    for row, worker in enumerate(workers):
        out = sum(move.max_requests for move in found.moves if move.source == row)
        assert out <= (bounds.max_moving_draining if worker.is_draining else bounds.max_moving)
        others = [move for move in found.moves if move.destination == row]
        assert sum(move.max_requests for move in others if move.purpose != "draining") <= bounds.max_moving
        assert sum(move.max_requests for move in others) <= bounds.max_moving_draining
        assert not (worker.is_draining and others)
    assert all(move.reason and move.max_requests > 0 and move.num_blocks > 0 for move in found.moves)


@settings(max_examples=200)
@given(workers=_WORKERS)
def test_the_fullest_is_never_fuller_afterwards(workers: list[Worker]) -> None:
    _fitting(workers, [])
    before = _least(workers)
    for move in pair(view_of(workers), _RULES, MoveHistory(), 0.0).moves:
        carry_out(workers, move)
    assert _least(workers) >= before


@settings(max_examples=100)
@given(workers=_WORKERS, draining=st.lists(st.booleans(), min_size=6, max_size=6))
def test_a_load_that_does_not_change_comes_to_rest(workers: list[Worker], draining: list[bool]) -> None:
    _fitting(workers, draining)
    # Each answer can move only a few times before nobody gains any more.
    most = 20 * sum(len(worker.answers) for worker in workers) + 1
    for _ in range(most):
        moves = pair(view_of(workers), _RULES, MoveHistory(), 0.0).moves
        if not moves:
            break
        for move in moves:
            assert carry_out(workers, move) == move.max_requests
    assert not pair(view_of(workers), _RULES, MoveHistory(), 0.0).moves
    assert all(worker.available_blocks >= 0 for worker in workers)


@settings(max_examples=100)
@given(
    answers=st.lists(st.lists(st.builds(Answer, st.integers(-1, 2), st.integers(1, 10)), max_size=8), max_size=3),
    ends=st.lists(st.builds(Answer, st.integers(-1, 2), st.integers(1, 10)), max_size=15),
)
def test_who_drains_is_empty_after_as_many_rounds_as_it_has_answers(
    answers: list[list[Answer]], ends: list[Answer]
) -> None:
    # Whoever has all of them has blocks left.
    workers = [Worker(800, answers=those) for those in (*answers, [])] + [Worker(200, ends, is_draining=True)]
    for _ in range(len(ends)):
        for move in pair(view_of(workers), _RULES, MoveHistory(), 0.0).moves:
            carry_out(workers, move)
    assert not workers[-1].answers
