"""Both machines of a move, cell by cell: what every event does in every state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import DeadlineExceeded, NotFound, TandemError
from contracts.ids import RequestId
from contracts.requests import TokenDelta
from decode.moves import destination as to
from decode.moves import source as out
from decode.moves.destination import FEW_TOKENS, MOST_ROUNDS, DestinationMove, DestinationState
from decode.moves.source import CLAIM_BACK_AFTER_S, CLAIM_PATIENCE_S, COPY_LIMIT_S, SourceMove, SourceState

if TYPE_CHECKING:
    from collections.abc import Sequence

# --- the source -----------------------------------------------------------------------------------

SOURCE_EVENTS: dict[str, out.SourceEvent] = {
    "taken": out.Taken(),
    "not taken": out.NotTaken("no room"),
    "yield": out.YieldAsked(),
    "yield if few": out.YieldAsked(num_lacking=4, at_most=4),
    "yield if few, of many": out.YieldAsked(num_lacking=5, at_most=4),
    "stopped": out.Stopped(),
    "confirmed": out.LeaseOver(confirmed=True, reason="acknowledged"),
    "lost": out.LeaseOver(confirmed=False, reason="expired"),
    "declined": out.Declined("no room"),
    "gone": out.Gone("cancelled"),
    "outgrown": out.Outgrown(),
    "granted": out.ClaimAnswered(granted=True),
    "refused": out.ClaimAnswered(granted=False, reason="it is another's"),
}
#: What leads to each state of a move of an answer that runs.
TO_SOURCE_STATE: dict[SourceState, tuple[str, ...]] = {
    SourceState.OFFERED: (),
    SourceState.COPYING: ("taken",),
    SourceState.STOPPING: ("taken", "yield"),
    SourceState.PAUSED: ("taken", "yield", "stopped"),
    SourceState.CLAIMING: ("taken", "yield", "stopped", "late"),
}
#: By state and event: the next state and the instructions' names. What is not named changes nothing and says nothing.
SOURCE_TABLE: dict[SourceState, dict[str, tuple[SourceState, tuple[str, ...]]]] = {
    SourceState.OFFERED: {
        "taken": (SourceState.COPYING, ()),
        "not taken": (SourceState.ENDED, ("MoveOver",)),
        "yield": (SourceState.STOPPING, ("Stop",)),
        "yield if few": (SourceState.STOPPING, ("Stop",)),
        "yield if few, of many": (SourceState.OFFERED, ("GiveMore",)),
        "confirmed": (SourceState.ENDED, ("MoveOver",)),
        "lost": (SourceState.ENDED, ("MoveOver",)),
        "declined": (SourceState.ENDED, ("MoveOver",)),
        "gone": (SourceState.ENDED, ("TakeBack", "MoveOver")),
        "outgrown": (SourceState.ENDED, ("TakeBack", "MoveOver")),
    },
    SourceState.COPYING: {
        "yield": (SourceState.STOPPING, ("Stop",)),
        "yield if few": (SourceState.STOPPING, ("Stop",)),
        "yield if few, of many": (SourceState.COPYING, ("GiveMore",)),
        "confirmed": (SourceState.ENDED, ("MoveOver",)),
        "lost": (SourceState.ENDED, ("MoveOver",)),
        "declined": (SourceState.ENDED, ("MoveOver",)),
        "gone": (SourceState.ENDED, ("TakeBack", "MoveOver")),
        "outgrown": (SourceState.ENDED, ("TakeBack", "MoveOver")),
    },
    SourceState.STOPPING: {
        "stopped": (SourceState.PAUSED, ("GiveRest",)),
        "confirmed": (SourceState.ENDED, ("GoOn", "MoveOver")),
        "lost": (SourceState.ENDED, ("GoOn", "MoveOver")),
        "declined": (SourceState.ENDED, ("GoOn", "MoveOver")),
        "gone": (SourceState.ENDED, ("TakeBack", "MoveOver")),
        "outgrown": (SourceState.ENDED, ("TakeBack", "GoOn", "MoveOver")),
    },
    SourceState.PAUSED: {
        # It has stopped: there will never be less.
        "yield": (SourceState.PAUSED, ("GiveRest",)),
        "yield if few": (SourceState.PAUSED, ("GiveRest",)),
        "yield if few, of many": (SourceState.PAUSED, ("GiveRest",)),
        "lost": (SourceState.ENDED, ("GoOn", "MoveOver")),
        "declined": (SourceState.ENDED, ("GoOn", "MoveOver")),
        # It may be that it is gone because it is the destination's.
        "gone": (SourceState.ENDED, ("MoveOver",)),
    },
    SourceState.CLAIMING: {
        "yield": (SourceState.CLAIMING, ("GiveRest",)),
        "yield if few": (SourceState.CLAIMING, ("GiveRest",)),
        "yield if few, of many": (SourceState.CLAIMING, ("GiveRest",)),
        # Its own claim may have been granted by now.
        "gone": (SourceState.ENDED, ("MoveOver",)),
        "granted": (SourceState.ENDED, ("TakeBack", "GoOn", "MoveOver")),
        "refused": (SourceState.ENDED, ("Discard", "MoveOver")),
    },
}


def names(instructions: Sequence[object]) -> tuple[str, ...]:
    return tuple(type(instruction).__name__ for instruction in instructions)


def source_in(state: SourceState) -> SourceMove:
    machine = SourceMove(0.0)
    for event in TO_SOURCE_STATE[state]:
        if event == "late":
            machine.handle(out.Look(), CLAIM_BACK_AFTER_S)
        else:
            machine.handle(SOURCE_EVENTS[event], 0.0)
    assert machine.state is state
    return machine


@pytest.mark.parametrize("event", SOURCE_EVENTS)
@pytest.mark.parametrize("state", SOURCE_TABLE)
def test_every_event_in_every_state_of_the_source(state: SourceState, event: str) -> None:
    machine = source_in(state)
    said = machine.handle(SOURCE_EVENTS[event], 0.0)
    assert (machine.state, names(said)) == SOURCE_TABLE[state].get(event, (state, ()))
    assert (machine.due_s is None) is (machine.state is SourceState.ENDED)


def test_a_copy_that_takes_too_long_is_taken_back() -> None:
    for state in (SourceState.OFFERED, SourceState.COPYING):
        machine = source_in(state)
        assert machine.handle(out.Look(), COPY_LIMIT_S - 0.1) == []
        assert names(machine.handle(out.Look(), COPY_LIMIT_S)) == ("TakeBack", "MoveOver")


def test_a_claim_is_repeated_and_in_the_end_the_answer_is_given_up() -> None:
    machine = source_in(SourceState.CLAIMING)
    claims, now_s = 1, CLAIM_BACK_AFTER_S
    last: tuple[str, ...] = ()
    while machine.due_s is not None:
        now_s = machine.due_s
        last = names(machine.handle(out.Look(), now_s))
        claims += last == ("ClaimBack",)
    assert last == ("TakeBack", "GiveUp", "MoveOver")
    assert claims >= 8
    assert CLAIM_PATIENCE_S <= now_s - CLAIM_BACK_AFTER_S <= CLAIM_PATIENCE_S + 1.0


def test_a_confirmation_puts_the_claim_off() -> None:
    machine = source_in(SourceState.PAUSED)
    machine.handle(SOURCE_EVENTS["confirmed"], 0.9)
    assert machine.handle(out.Look(), CLAIM_BACK_AFTER_S) == []
    assert names(machine.handle(out.Look(), 0.9 + CLAIM_BACK_AFTER_S)) == ("ClaimBack",)


def test_what_stands_still_is_never_taken_back_once_it_was_told() -> None:
    """The answer to the offer may come after the gateway's word that it is the destination's."""
    machine = SourceMove(0.0, stands_still=True)
    assert names(machine.handle(SOURCE_EVENTS["gone"], 0.0)) == ("MoveOver",)
    machine = SourceMove(0.0, stands_still=True)
    machine.handle(SOURCE_EVENTS["taken"], 0.0)
    assert machine.state is SourceState.PAUSED
    assert machine.handle(SOURCE_EVENTS["yield"], 0.0) == []
    assert names(machine.handle(out.Look(), CLAIM_BACK_AFTER_S)) == ("ClaimBack",)


@given(st.lists(st.sampled_from([*SOURCE_EVENTS, "look"]), max_size=30), st.booleans())
def test_a_source_goes_on_or_lets_go_once(events: list[str], stands_still: bool) -> None:
    """Whatever comes, in whatever order: one end, and nothing after it; who stopped is told to go on, or ends."""
    machine, now_s = SourceMove(0.0, stands_still=stands_still), 0.0
    said: list[out.SourceInstruction] = []
    for event in events:
        now_s += 0.7
        said += machine.handle(out.Look() if event == "look" else SOURCE_EVENTS[event], now_s)
    while machine.due_s is not None:
        said += machine.handle(out.Look(), machine.due_s)
    found = names(said)
    assert found[-1] == "MoveOver"
    assert found.count("MoveOver") == 1
    assert sum(found.count(end) for end in ("GoOn", "Discard", "GiveUp")) <= 1
    if "GiveRest" in found and not any(isinstance(one, out.Gone) for one in map(SOURCE_EVENTS.get, events)):
        assert any(end in found for end in ("GoOn", "Discard", "GiveUp"))


# --- the destination ------------------------------------------------------------------------------

MORE = TokenDelta(request_id=RequestId("r"), index=2, token_ids=tuple(range(7)))

DESTINATION_EVENTS: dict[str, to.DestinationEvent] = {
    "caught up": to.CaughtUp(),
    "yielded": to.Yielded(None),
    "goes on": to.GoesOn(MORE, 7),
    "not found": to.NotYielded(NotFound("it does not leave")),
    "no answer": to.NotYielded(DeadlineExceeded("silence")),
    "complete": to.Complete(),
    "gone": to.Gone("cancelled"),
    "granted": to.ClaimAnswered(granted=True, next_index=3),
    "refused": to.ClaimAnswered(granted=False, reason="it is another's"),
}
TO_DESTINATION_STATE: dict[DestinationState, tuple[str, ...]] = {
    DestinationState.COMING: (),
    DestinationState.ASKING: ("caught up",),
    DestinationState.REST: ("caught up", "yielded"),
    DestinationState.CLAIMING: ("caught up", "yielded", "complete"),
}
DESTINATION_TABLE: dict[DestinationState, dict[str, tuple[DestinationState, tuple[str, ...]]]] = {
    DestinationState.COMING: {
        "caught up": (DestinationState.ASKING, ("AskYield",)),
        "complete": (DestinationState.CLAIMING, ("ClaimIt",)),
        "gone": (DestinationState.ENDED, ("Drop",)),
    },
    DestinationState.ASKING: {
        "yielded": (DestinationState.REST, ("TakeRest",)),
        "goes on": (DestinationState.COMING, ("TakeMore",)),
        "not found": (DestinationState.ENDED, ("Drop",)),
        # The rest may overtake the answer that announces it.
        "complete": (DestinationState.CLAIMING, ("ClaimIt",)),
        "gone": (DestinationState.ENDED, ("Drop",)),
    },
    DestinationState.REST: {
        "complete": (DestinationState.CLAIMING, ("ClaimIt",)),
        "gone": (DestinationState.ENDED, ("Drop",)),
    },
    DestinationState.CLAIMING: {
        "granted": (DestinationState.OWNER, ("Own",)),
        "refused": (DestinationState.ENDED, ("Drop",)),
        "gone": (DestinationState.ENDED, ("Drop",)),
    },
}


def destination_in(state: DestinationState) -> DestinationMove:
    machine = DestinationMove(0.0)
    for event in TO_DESTINATION_STATE[state]:
        machine.handle(DESTINATION_EVENTS[event], 0.0)
    assert machine.state is state
    return machine


@pytest.mark.parametrize("event", DESTINATION_EVENTS)
@pytest.mark.parametrize("state", DESTINATION_TABLE)
def test_every_event_in_every_state_of_the_destination(state: DestinationState, event: str) -> None:
    machine = destination_in(state)
    said = machine.handle(DESTINATION_EVENTS[event], 0.0)
    assert (machine.state, names(said)) == DESTINATION_TABLE[state].get(event, (state, ()))
    assert (machine.due_s is None) is machine.is_over


def test_a_source_that_is_silent_is_asked_three_times() -> None:
    machine = destination_in(DestinationState.ASKING)
    asks = 1
    while True:
        said = machine.handle(DESTINATION_EVENTS["no answer"], 0.0)
        if said:
            break
        assert machine.due_s is not None
        asks += names(machine.handle(to.Look(), machine.due_s)) == ("AskYield",)
    assert (asks, names(said)) == (3, ("Drop",))


def test_a_claim_that_nobody_answers_is_given_up() -> None:
    machine = destination_in(DestinationState.CLAIMING)
    found: list[str] = []
    while machine.due_s is not None:
        found += names(machine.handle(to.Look(), machine.due_s))
    assert found[-1] == "GiveUp"
    assert set(found[:-1]) == {"ClaimIt"}


def rounds(sizes: list[int]) -> list[int | None]:
    """For how much the source was to stop, ask by ask; it goes on as long as it may, with so many new tokens each."""
    machine = DestinationMove(0.0, in_rounds=True)
    asked: list[int | None] = []
    for size in sizes:
        (ask,) = machine.handle(to.CaughtUp(), 0.0)
        assert isinstance(ask, to.AskYield)
        asked.append(ask.at_most)
        if ask.at_most is None:
            return asked
        assert names(machine.handle(to.GoesOn(MORE, size), 0.0)) == ("TakeMore",)
    return asked


def test_rounds_go_on_while_they_shrink() -> None:
    assert rounds([150, 20, 9, 5]) == [FEW_TOKENS] * 4


@pytest.mark.parametrize("sizes", [[150, 150, 1], [150, 151, 1], [150, 20, 20, 1]])
def test_a_round_that_brought_no_less_is_the_last(sizes: list[int]) -> None:
    assert rounds(sizes) == [*[FEW_TOKENS] * (len(sizes) - 1), None]


def test_there_are_only_so_many_rounds() -> None:
    asked = rounds(list(range(900, 0, -1)))
    assert asked == [*[FEW_TOKENS] * MOST_ROUNDS, None]


def test_the_rest_of_what_comes_with_its_kv_is_asked_for_once() -> None:
    (ask,) = DestinationMove(0.0).handle(to.CaughtUp(), 0.0)
    assert ask == to.AskYield(at_most=None)


def test_all_rounds_together_have_the_time_of_one_copy() -> None:
    machine, now_s = DestinationMove(0.0, in_rounds=True), 0.0
    for size in (150, 20):
        now_s += COPY_LIMIT_S / 3
        machine.handle(to.CaughtUp(), now_s)
        machine.handle(to.GoesOn(MORE, size), now_s)
    assert machine.due_s == COPY_LIMIT_S
    (drop,) = machine.handle(to.Look(), COPY_LIMIT_S)
    assert isinstance(drop, to.Drop)
    assert drop.tell_source


@pytest.mark.parametrize(
    ("state", "event", "told"),
    [
        (DestinationState.COMING, to.Lost("its deadline"), True),
        (DestinationState.REST, to.Lost("no blocks"), True),
        (DestinationState.COMING, to.Look(), True),
        # These know.
        (DestinationState.COMING, to.Gone("cancelled"), False),
        (DestinationState.ASKING, to.NotYielded(NotFound("it does not leave")), False),
        # It may have been granted: the source must not go on for a word from here.
        (DestinationState.CLAIMING, to.ClaimAnswered(granted=False), False),
        (DestinationState.CLAIMING, to.Gone("cancelled"), False),
    ],
)
def test_a_source_is_told_of_what_it_waits_for_in_vain(
    state: DestinationState, event: to.DestinationEvent, told: bool
) -> None:
    (drop,) = destination_in(state).handle(event, COPY_LIMIT_S)
    assert isinstance(drop, to.Drop)
    assert drop.tell_source is told


@given(st.lists(st.sampled_from([*DESTINATION_EVENTS, "look"]), max_size=30), st.booleans())
def test_a_destination_owns_or_lets_go_once(events: list[str], in_rounds: bool) -> None:
    machine, now_s = DestinationMove(0.0, in_rounds=in_rounds), 0.0
    said: list[to.DestinationInstruction] = []
    for event in events:
        now_s += 0.3
        said += machine.handle(to.Look() if event == "look" else DESTINATION_EVENTS[event], now_s)
    while machine.due_s is not None:
        said += machine.handle(to.Look(), machine.due_s)
    found = names(said)
    assert sum(found.count(end) for end in ("Own", "Drop", "GiveUp")) == 1
    if "Own" in found:
        assert "ClaimIt" in found[: found.index("Own")]
    if "ClaimIt" in found:
        # Whoever has claimed never tells the source to go on.
        assert not any(isinstance(one, to.Drop) and one.tell_source for one in said)


def test_errors_of_a_yield_are_told_in_words() -> None:
    machine = destination_in(DestinationState.ASKING)
    (drop,) = machine.handle(to.NotYielded(TandemError("the disk is on fire")), 0.0)
    assert isinstance(drop, to.Drop)
    assert "the disk is on fire" in drop.reason
