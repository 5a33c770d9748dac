"""Who gives requests to whom: each rule on its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from contracts.ids import WorkerId
from contracts.messages import PriorityUse
from coordinator.policy.migration_pairs import pair
from coordinator.policy.move_terms import PURPOSES, MoveHistory, MovePair, MoveRules
from coordinator.policy.virtual_usage import UsageRules, WorkerUse, usage_view

if TYPE_CHECKING:
    from coordinator.policy.move_terms import Pairing, Purpose

#: Of 16 tokens: who has fewer than 4 blocks for each answer gives, who has more than 20 takes. Growth: two.
_RULES = MoveRules(
    usage=UsageRules(headroom_tokens={1: 320}, growth_tokens=32),
    low_tokens=64,
    high_tokens=320,
    max_moving=2,
    max_moving_draining=3,
)


def _use(name: str, available: int, *priorities: tuple[int, int, int], total: int = 100) -> WorkerUse:
    """`priorities`: (priority, answers, blocks)."""
    uses = tuple(PriorityUse(*each) for each in priorities)
    return WorkerUse(WorkerId(name), total_blocks=total, available_blocks=available, priorities=uses)


def _look(*uses: WorkerUse, rules: MoveRules = _RULES, history: MoveHistory | None = None, at_s: float = 0) -> Pairing:
    return pair(usage_view(uses), rules, history or MoveHistory(), at_s)


def _only(purpose: Purpose, **changes: object) -> MoveRules:
    return replace(_RULES, purposes=frozenset({purpose}), **changes)  # type: ignore[arg-type]


def _ways(found: Pairing) -> list[tuple[str, int, int, int]]:
    return [(move.purpose, move.source, move.destination, move.max_requests) for move in found.moves]


def _the_move(found: Pairing) -> MovePair:
    (move,) = found.moves
    return move


_FULL = _use("full", 10, (0, 9, 90))
_EMPTY = _use("empty", 100)
_HALF = _use("half", 50, (0, 5, 50))


# --- balance ------------------------------------------------------------------------------------------


def test_nothing_moves_where_nobody_is_short() -> None:
    found = _look(_HALF, _EMPTY)
    assert not found.moves
    assert not found.not_moved


def test_the_fullest_gives_to_the_emptiest_until_it_is_above_the_threshold() -> None:
    full = _use("full", 25, (0, 9, 75))
    found = _look(full, _HALF, _EMPTY, _use("fuller", 24, (0, 9, 76)), rules=_only("balance"))
    # One answer away leaves 33/8 = 4.2 blocks for each. The empty one is then no better than before it: B is 1.
    assert _ways(found) == [("balance", 3, 2, 1), ("balance", 0, 2, 1)]
    assert [move.num_blocks for move in found.moves] == [8, 8]
    assert "fuller has 2.67 blocks for each of 9 answers, fewer than 4" in found.moves[0].reason
    assert "empty has 100 blocks" in found.moves[0].reason


def test_several_moves_between_two_workers_are_one_ask_within_the_bound() -> None:
    move = _the_move(_look(_FULL, _EMPTY, rules=_only("balance")))
    assert (move.max_requests, move.num_blocks) == (2, 20)
    assert move.running
    assert not move.waiting
    assert move.max_priority is None
    assert move.mode == "auto"


def test_moves_under_way_count_against_the_bounds_and_as_done() -> None:
    assert not _look(_FULL._replace(moving_out=2), _EMPTY).moves
    assert _look(_FULL, _EMPTY._replace(moving_in=2), rules=_only("balance")).not_moved == {"busy": 1}
    assert _the_move(_look(_FULL, _EMPTY._replace(moving_in=1), rules=_only("balance"))).max_requests == 1
    # With those two gone it has enough.
    nearly = _use("full", 20, (0, 8, 80))._replace(moving_out=2)
    assert not _look(nearly, _EMPTY, rules=_only("balance", max_moving=3)).moves
    assert not _look(_FULL, _EMPTY, rules=replace(_RULES, max_moving_total=0)).moves


@pytest.mark.parametrize(
    ("taker", "why"),
    [
        (_HALF, "not_free"),
        (_EMPTY._replace(is_draining=True), "no_peer"),
        (_EMPTY._replace(is_up=False), "no_peer"),
        (_EMPTY._replace(writes=False, reads=True), "no_peer"),
        (_EMPTY._replace(model_class=1, kv_class=1), "no_peer"),
        (_EMPTY._replace(preempted_answers=1), "no_peer"),
        (_EMPTY._replace(available_blocks=10), "no_room"),
        (_EMPTY._replace(arriving_blocks=92), "no_room"),
    ],
    ids=["not above high", "draining", "silent", "prefill", "model", "preempts", "full", "promised"],
)
def test_whom_nothing_is_given(taker: WorkerUse, why: str) -> None:
    found = _look(_FULL, taker, rules=_only("balance"))
    assert not found.moves
    assert found.not_moved == {why: 1}


def test_another_kind_of_kv_is_the_second_choice_and_by_tokens() -> None:
    other = _EMPTY._replace(kv_class=1)
    alike = _use("alike", 90, (0, 1, 10))
    assert _the_move(_look(_FULL, other, alike, rules=_only("balance", max_moving=1))).destination == 2
    move = _the_move(_look(_FULL, other, rules=_only("balance", max_moving=1)))
    assert (move.destination, move.mode) == (1, "tokens")


def test_nobody_is_left_with_less_than_low_nor_with_less_than_the_giver() -> None:
    # 22 for its one answer; of the 70 blocks of the other's nothing would fit, of 20 it would be left with 1.
    taker = _use("taker", 22, (0, 1, 78))
    assert _look(_use("giver", 3, (0, 1, 97)), taker, rules=_only("balance")).not_moved == {"no_room": 1}
    # 20 less leaves 5/2 there: it would have to give it back.
    assert (
        _look(_use("giver", 6, (0, 4, 60), total=66), _use("taker", 25, (0, 1, 75)), rules=_only("balance")).moves == ()
    )
    lone = _look(_use("giver", 3, (0, 1, 12), total=15), _use("taker", 30, (0, 1, 70)), rules=_only("balance"))
    # 15 here against 18/2 there.
    assert lone.not_moved == {"no_gain": 1}


def test_nobody_is_left_with_less_than_low_to_help_one_that_lacks_much() -> None:
    giver = _use("giver", 0, (0, 4, 80), total=80)._replace(head_blocks=200)
    # One of 20 leaves 5 blocks for two.
    assert _look(giver, _use("taker", 25, (0, 1, 75)), rules=_only("balance")).not_moved == {"not_free": 1}


def test_who_lacked_blocks_may_end_up_with_more_than_the_taker() -> None:
    giver = _use("giver", 10, (0, 4, 70), total=80)._replace(head_blocks=12)
    # One of 18 leaves 16 for three here, and 10 for two there.
    move = _the_move(_look(giver, _use("taker", 28, (0, 1, 72)), rules=_only("balance")))
    assert "giver lacks 2 blocks for 4 answers" in move.reason
    assert "then 5.33 and 5 " in move.reason


def test_a_lack_is_smaller_when_an_answer_has_left_though_it_is_shared_by_fewer() -> None:
    giver = _use("giver", 40, (0, 2, 8), total=48)._replace(head_blocks=50)
    taker = _use("taker", 3000, (0, 100, 7000), total=10_000)
    # 10 blocks are missing, five for each; then six, for one.
    assert _the_move(_look(giver, taker, rules=_only("balance", max_moving=1))).purpose == "balance"


def test_what_a_taker_is_given_counts_for_the_next_giver() -> None:
    givers = [_use(name, 3, (0, 4, 77), total=80) for name in ("a", "b")]
    # 39 for two are left there: not more than `high`.
    found = _look(*givers, _use("taker", 58, (0, 1, 42)), rules=_only("balance", max_moving_draining=4, max_moving=4))
    assert _ways(found) == [("balance", 0, 2, 1)]
    assert found.not_moved == {"not_free": 1}


def test_a_priority_that_is_new_to_a_taker_brings_its_headroom() -> None:
    giver = _use("giver", 22, (1, 7, 70), total=92)
    taker = _use("taker", 38, (0, 1, 62))
    # 10 blocks and 20 of headroom leave 8 for two.
    found = _look(giver, taker, rules=_only("balance"))
    assert (found.moves, found.not_moved) == ((), {"not_free": 1})
    knows = taker._replace(priorities=(PriorityUse(0, 1, 52), PriorityUse(1, 1, 10)), available_blocks=62)
    assert _look(giver, knows, rules=_only("balance")).moves


def test_none_goes_back_within_the_cooldown() -> None:
    history = MoveHistory()
    history.moved(WorkerId("empty"), WorkerId("full"), 100.0)
    assert _look(_FULL, _EMPTY, rules=_only("balance"), history=history, at_s=109.0).not_moved == {"cooldown": 1}
    assert _look(_FULL, _EMPTY, rules=_only("balance"), history=history, at_s=111.0).moves
    assert _look(_FULL, _EMPTY._replace(worker_id=WorkerId("other")), history=history, at_s=101.0).moves
    # On the same way more may follow.
    history = MoveHistory()
    history.moved(WorkerId("full"), WorkerId("empty"), 100.0)
    assert _look(_FULL, _EMPTY, history=history, at_s=100.1).moves


def test_who_refused_is_left_alone_for_a_while() -> None:
    history = MoveHistory()
    history.refused(WorkerId("full"), WorkerId("empty"), 100.0)
    assert _look(_FULL, _EMPTY, _HALF, rules=_only("balance"), history=history, at_s=101.0).moves == ()
    assert _look(_FULL, _EMPTY, history=history, at_s=103.0).moves
    history.refused(WorkerId("full"), WorkerId("empty"), 103.0)
    history.forget(WorkerId("empty"))
    assert _look(_FULL, _EMPTY, history=history, at_s=103.1).moves


def test_a_history_is_bounded() -> None:
    history = MoveHistory(max_remembered=2)
    for number in range(3):
        history.moved(WorkerId(f"giver-{number}"), WorkerId("taker"), float(number))
    assert history.cooling(WorkerId("taker"), 3.0, _RULES) == ["giver-1", "giver-2"]


# --- memory -------------------------------------------------------------------------------------------


def test_who_lacks_blocks_to_grow_gives_at_once_and_also_back() -> None:
    history = MoveHistory()
    history.moved(WorkerId("half"), WorkerId("full"), 100.0)
    found = _look(_FULL, _HALF, history=history, at_s=100.5, rules=_only("memory"))
    # 10 for 9 answers, each of which is promised two. The other has but 10 for each: below `high`, above `low`.
    move = _the_move(found)
    assert (move.source, move.destination, move.max_requests) == (0, 1, 1)
    assert "0 preempted answers and 10 blocks available for 9" in move.reason


def test_preempted_answers_go_first_as_they_wait() -> None:
    full = _FULL._replace(preempted_answers=1, head_blocks=12)
    waiting, running = _look(full, _EMPTY, rules=_only("memory")).moves
    assert (waiting.waiting, waiting.running, waiting.max_requests, waiting.num_blocks) == (True, False, 1, 12)
    assert (running.waiting, running.running, running.max_requests) == (False, True, 1)


def test_who_preempts_gives_even_if_blocks_came_free() -> None:
    move = _the_move(
        _look(_HALF._replace(preempted_answers=1, head_blocks=30), _use("empty", 300, total=300), rules=_only("memory"))
    )
    assert move.waiting


# --- priority -----------------------------------------------------------------------------------------


def test_low_priorities_leave_whoever_lacks_headroom_for_high_ones() -> None:
    mixed = _use("mixed", 30, (0, 6, 60), (1, 1, 10))
    found = _look(mixed, _EMPTY, rules=_only("priority"))
    move = _the_move(found)
    # Of 30 blocks 20 are kept for the high one: 10 for 7 answers. Two moves leave 30 for 5.
    assert (move.purpose, move.max_requests, move.max_priority) == ("priority", 2, 0)
    assert "with 20 blocks kept for higher priorities" in move.reason
    assert not _look(mixed._replace(priorities=(PriorityUse(0, 7, 70),)), _EMPTY, rules=_only("priority")).moves


def test_high_ones_alone_are_not_torn_apart_for_their_headroom() -> None:
    found = _look(_use("high", 30, (1, 7, 70)), _EMPTY, rules=_only("priority"))
    assert found.not_moved == {"nothing_to_move": 1}


# --- defragmentation ----------------------------------------------------------------------------------


def test_answers_make_room_for_the_first_in_line_that_lacks_least() -> None:
    waits = _use("waits", 40, (0, 6, 60))._replace(head_blocks=50)
    nearer = _use("nearer", 45, (0, 5, 55))._replace(head_blocks=50)
    other = _use("other", 60, (0, 4, 40))
    first, second = _look(waits, nearer, other, rules=_only("defragment")).moves
    # The nearer one lacks 50 + 2*6 - 45 = 17 blocks: one answer that is as large, of those that fit.
    assert (first.source, first.destination, first.max_requests) == (1, 2, 1)
    # 60 less two for each of four, for the one that comes, and once more.
    assert (first.need_blocks, first.max_blocks) == (17, 48)
    assert "50 blocks are wanted at nearer, where 45 are available; other has room for 48" in first.reason
    # The other lacks 24, and has what is left there.
    assert (second.source, second.destination, second.need_blocks) == (0, 2, 24)


def test_several_takers_make_room_together_each_with_what_it_has() -> None:
    waits = _use("waits", 40, (0, 6, 60))._replace(head_blocks=76)
    takers = [_use(f"taker-{number}", 45, (0, 2, 55)) for number in range(2)]
    moves = _look(waits, *takers, rules=_only("defragment")).moves
    # 76 + 2*7 - 40 = 50 are missing, 37 is what the first has room for.
    assert [(move.destination, move.need_blocks, move.max_blocks) for move in moves] == [(1, 37, 37), (2, 11, 37)]


def test_nothing_moves_for_a_demand_that_would_not_fit_even_so() -> None:
    waits = _use("waits", 10, (0, 9, 90))._replace(head_blocks=95)
    assert _look(waits, _HALF, rules=_only("defragment")).not_moved == {"not_enough": 1}


def _stuck(name: str, available: int, *prompts: int) -> WorkerUse:
    """With six answers, and prompts that wait for so many blocks each."""
    use = _use(name, available, (0, 6, 100 - available))
    return use._replace(
        reads=True, head_blocks=prompts[0], queued_blocks=sum(prompts), head_moves=True, waiting_prompts=len(prompts)
    )


def test_a_prompt_that_waits_for_blocks_goes_where_it_can_be_read_at_once() -> None:
    reader = _use("reader", 95, (0, 1, 5))._replace(reads=True)
    move = _the_move(_look(_stuck("waits", 40, 60), _EMPTY, reader, rules=_only("defragment")))
    assert (move.destination, move.waiting, move.running, move.max_requests) == (2, True, False, 1)
    # All but two for each of one, and for the one that comes.
    assert (move.num_blocks, move.max_blocks) == (60, 91)
    # It costs no more than messages: other moves do not keep it here. One the other way just now does.
    busy = reader._replace(moving_in=2)
    assert _look(_stuck("waits", 40, 60), busy, rules=_only("defragment")).moves
    history = MoveHistory()
    history.moved(WorkerId("reader"), WorkerId("waits"), 100.0)
    stays = _look(_stuck("waits", 40, 60), reader, rules=_only("defragment"), history=history, at_s=100.1)
    assert not [move for move in stays.moves if move.waiting]


def test_nothing_makes_room_for_prompts_that_were_asked_to_go() -> None:
    gone = _stuck("waits", 40, 60)._replace(waiting_prompts=0)
    taker = _use("taker", 60, (0, 4, 40))
    assert not _look(gone, taker, rules=_only("defragment")).moves
    assert _look(gone._replace(waiting_prompts=1), taker, rules=_only("defragment")).moves


def test_prompts_behind_one_that_fits_nowhere_go_where_they_fit() -> None:
    reader = _use("reader", 50, (0, 4, 50))._replace(reads=True)
    (move,) = _look(_stuck("waits", 30, 80, 10, 4), reader, rules=_only("defragment")).moves
    # The two of 7 blocks in the mean; which of them fit the source knows.
    assert (move.max_requests, move.num_blocks, move.max_blocks) == (2, 14, 40)


@pytest.mark.parametrize(
    "taker",
    [
        _stuck("reader", 60, 70),
        _use("reader", 95, (0, 1, 5))._replace(reads=True, preempted_answers=1),
        _use("reader", 95, (0, 1, 5))._replace(reads=True, is_draining=True),
        _use("reader", 95, (0, 1, 5))._replace(reads=True, kv_class=1, model_class=1),
    ],
    ids=["waits itself", "preempts", "drains", "another model"],
)
def test_where_a_prompt_would_wait_as_well_it_is_not_sent(taker: WorkerUse) -> None:
    assert not [move for move in _look(_stuck("waits", 10, 20), taker, rules=_only("defragment")).moves if move.waiting]


def test_prompts_leave_a_worker_whose_preempted_answer_comes_first() -> None:
    starves = _stuck("waits", 30, 12, 5, 5)._replace(preempted_answers=1, waiting_prompts=2)
    (move,) = _look(starves, _EMPTY._replace(reads=True), rules=_only("defragment")).moves
    assert (move.max_requests, move.num_blocks) == (2, 10)


# --- draining -----------------------------------------------------------------------------------------


def test_whoever_drains_gives_all_it_may_to_whoever_has_room() -> None:
    found = _look(_HALF._replace(is_draining=True, worker_id=WorkerId("ends")), _FULL, _HALF)
    # The half full one is not above `high`, and that does not matter.
    assert _ways(found)[0] == ("draining", 0, 2, 3)
    assert "ends is draining" in found.moves[0].reason


def test_answers_stay_where_only_prompts_are_to_leave() -> None:
    ends = _use("ends", 90, (0, 3, 45))._replace(is_draining=True, keeps_answers=True, reads=True, waiting_prompts=3)
    other = _use("other", 90)._replace(reads=True)
    move = _the_move(_look(ends, other, rules=_only("draining")))
    assert (move.max_requests, move.waiting, move.running) == (3, True, False)
    moves = _look(ends._replace(keeps_answers=False), other, rules=_only("draining")).moves
    assert {(move.waiting, move.running) for move in moves} == {(True, False), (False, True)}


def test_draining_uses_several_takers_and_stops_where_nobody_has_room() -> None:
    ends = _use("ends", 55, (0, 3, 45))._replace(is_draining=True)
    # Each takes one of 15 and is then full: 15 + 2 * (answers + 1).
    takers = [_use(f"taker-{number}", 22, (0, 2, 78)) for number in range(2)]
    found = _look(ends, *takers, rules=_only("draining"))
    assert _ways(found) == [("draining", 0, 1, 1), ("draining", 0, 2, 1)]
    assert found.not_moved == {"no_room": 1}


def test_a_draining_reader_gives_its_waiting_prompts() -> None:
    ends = _use("ends", 90)._replace(reads=True, writes=False, is_draining=True, waiting_prompts=3, queue_s=3.0)
    other = _use("other", 90)._replace(reads=True, writes=False, queue_s=50.0)
    move = _the_move(_look(ends, other, _EMPTY, rules=_only("draining")))
    assert (move.destination, move.max_requests, move.waiting, move.running) == (1, 3, True, False)
    assert move.reading_s == pytest.approx(3.0)


# --- prompts ------------------------------------------------------------------------------------------


def _reader(name: str, waiting: int, queue_s: float) -> WorkerUse:
    return _use(name, 90)._replace(reads=True, writes=False, waiting_prompts=waiting, queue_s=queue_s)


def test_prompts_go_where_they_are_read_notably_sooner() -> None:
    found = _look(_reader("long", 8, 8.0), _reader("short", 1, 4.0), _reader("shortest", 0, 3.0))
    # Two: then it would be read a second later there than it is here.
    assert _ways(found) == [("prompts", 0, 2, 2), ("prompts", 0, 1, 1)]
    assert not _look(_reader("long", 8, 8.0), _reader("short", 0, 6.6)).moves
    assert _look(_reader("long", 8, 8.0), _reader("short", 0, 6.6)).not_moved == {"no_gain": 1}


def test_no_more_prompts_than_allowed_go_in_one_round() -> None:
    assert _the_move(_look(_reader("long", 50, 50.0), _reader("short", 0, 0.0))).max_requests == _RULES.max_prompts


def test_a_prompt_goes_only_to_those_whom_its_writer_understands() -> None:
    other = _reader("short", 0, 0.0)._replace(kv_class=1)
    assert not _look(_reader("long", 50, 50.0), other).moves
    # Whoever reads and writes would have written the answer, too.
    mixed = _reader("mixed", 50, 50.0)._replace(writes=True)
    assert not _look(mixed, _reader("short", 0, 0.0)).moves
    assert _look(mixed, _reader("short", 0, 0.0)._replace(writes=True)).moves


# --- together -----------------------------------------------------------------------------------------


def test_purposes_can_be_left_out() -> None:
    uses = (
        _FULL._replace(preempted_answers=1, head_blocks=12, reads=True, waiting_prompts=9, queue_s=90.0),
        _EMPTY._replace(reads=True),
        _HALF._replace(is_draining=True),
    )
    for purpose in PURPOSES:
        assert {move.purpose for move in _look(*uses, rules=_only(purpose)).moves} <= {purpose}
    assert _look(*uses, rules=replace(_RULES, purposes=frozenset())).moves == ()


def test_who_takes_in_a_round_gives_nothing_in_it() -> None:
    found = _look(_FULL, _EMPTY, _use("ends", 10, (0, 30, 90))._replace(is_draining=True))
    givers, takers = {move.source for move in found.moves}, {move.destination for move in found.moves}
    assert givers
    assert not givers & takers


def test_who_gave_for_one_purpose_takes_nothing_for_another() -> None:
    waits = _use("waits", 100, (0, 1, 900), total=1000)._replace(head_blocks=110)
    big = _use("big", 1500, (0, 1, 500), total=2000)
    full = _use("full", 2, (0, 9, 98))
    # With its only answer gone the first would be the emptiest of all.
    rules = replace(_RULES, purposes=frozenset({"defragment", "balance"}))
    assert _ways(_look(waits, big, full, rules=rules)) == [("defragment", 0, 1, 1), ("balance", 2, 1, 1)]


@pytest.mark.parametrize(("low", "high"), [(5.0, 5.0), (6.0, 5.0), (-1.0, 5.0)])
def test_thresholds_that_would_never_rest_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="low_tokens"):
        MoveRules(low_tokens=low, high_tokens=high)


def test_bounds_that_would_keep_a_drain_back_are_refused() -> None:
    with pytest.raises(ValueError, match="max_moving"):
        MoveRules(max_moving=5, max_moving_draining=4)
