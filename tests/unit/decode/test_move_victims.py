"""Which requests leave a worker: one order for workers and for studies."""

from __future__ import annotations

import pytest

from decode.moves.victims import Candidate, Kind, Wanted, begin_some, in_order

PREEMPTED = Candidate("preempted", Kind.PREEMPTED, 0, 300, 19)
NEXT = Candidate("next", Kind.PROMPT, 0, 4000, 250, place=0)
LATER = Candidate("later", Kind.PROMPT, 0, 64, 4, place=1)
LAST = Candidate("last", Kind.PROMPT, 0, 160, 10, place=2)
SHORT = Candidate("short", Kind.RUNNING, 0, 100, 7)
MIDDLE = Candidate("middle", Kind.RUNNING, 0, 900, 57)
LONG = Candidate("long", Kind.RUNNING, 0, 3000, 188)
URGENT = Candidate("urgent", Kind.RUNNING, 1, 50, 4)
ALL = [URGENT, LONG, LAST, SHORT, NEXT, PREEMPTED, MIDDLE, LATER]


def _begun(wanted: Wanted, *, refusing: str = "") -> list[str]:
    begun: list[str] = []

    def begin(name: str) -> bool:
        if name == refusing:
            return False
        begun.append(name)
        return True

    assert begin_some(ALL, wanted, begin) == len(begun)
    return begun


def test_who_waits_goes_first_then_the_lowest_priority_then_the_shortest() -> None:
    order = [one.request for one in in_order(ALL, Wanted(max_requests=9))]
    assert order == ["preempted", "last", "later", "next", "short", "middle", "long", "urgent"]


def test_prompts_go_as_they_stand_in_line_where_the_line_is_in_the_way() -> None:
    assert _begun(Wanted(max_requests=3, running=False, first_in_line=True)) == ["preempted", "next", "later"]


def test_who_is_too_large_is_passed_over() -> None:
    wanted = Wanted(max_requests=4, running=False, first_in_line=True, max_blocks=30)
    assert _begun(wanted) == ["preempted", "later"]
    assert _begun(wanted._replace(max_blocks=33)) == ["preempted", "later", "last"]


@pytest.mark.parametrize(
    ("need", "most", "number", "begun"),
    [
        (20, None, 3, ["middle"]),
        (58, None, 3, ["long"]),
        (58, 100, 3, ["middle", "short"]),
        (58, 60, 3, ["middle"]),
        (300, None, 3, ["long", "middle", "short"]),
        (240, None, 2, ["long", "middle"]),
        (0, None, 2, ["short", "middle"]),
    ],
)
def test_as_few_and_as_small_as_make_the_room(need: int, most: int | None, number: int, begun: list[str]) -> None:
    wanted = Wanted(max_requests=number, waiting=False, max_priority=0, need_blocks=need, max_blocks=most)
    assert _begun(wanted) == begun


def test_who_cannot_begin_makes_place_for_the_next() -> None:
    assert _begun(Wanted(max_requests=2, waiting=False), refusing="short") == ["middle", "long"]
    wanted = Wanted(max_requests=1, waiting=False, need_blocks=20, max_blocks=200)
    assert _begun(wanted, refusing="middle") == ["long"]


def test_no_more_than_are_wanted() -> None:
    assert _begun(Wanted(max_requests=0)) == []
    assert _begun(Wanted(max_requests=9, waiting=False, max_priority=-1)) == []
