"""Who gives requests to whom: Llumnix' pairing with its `balanced` condition (OSDI'24, section 4.4.3; defaults of the
released code differ), one rule for each purpose, the most urgent first.

- **draining**: everything leaves a worker that drains, to whoever has room; only its prompts, where its answers are to
  stay.
- **memory**: answers that were preempted, or will soon be for want of blocks to grow into, go where they can go on.
- **priority**: answers of low priority leave a worker whose high ones lack their headroom.
- **defragment**: where the first in line waits for more blocks than are free, prompts go on to whoever has room for
  them now; where the first fits nowhere, though others together have as many, answers leave the worker that lacks
  least.
- **balance**: answers leave workers with a freeness below `low`, to those above `high`, the fullest to the emptiest.
- **prompts**: those that nobody has begun to read go where they are predicted to be read notably sooner.

Each on its own, with what was decided before counted already. Whoever gives something away gets nothing in the same
round. But for draining and defragmenting, a move must leave the giver better off than it was, the taker better off than
the giver then (`0 < diff_after < diff_before`), and the taker above `low`: applied again and again to a load that does
not change it comes to an end. So does defragmenting: whoever takes has nobody waiting for blocks, and what it takes it
can begin with at once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from contracts.requests import MOST_PRIORITY
from coordinator.policy.move_round import Round, Victim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from coordinator.policy.fleet_view import Flags
    from coordinator.policy.move_terms import MoveHistory, MoveRules, Pairing, Purpose
    from coordinator.policy.virtual_usage import Blocks, UsageView

#: Of an answer that waits nobody tells the priority: it counts as the common one.
_COMMON_LEVEL = MOST_PRIORITY


def pair(view: UsageView, rules: MoveRules, history: MoveHistory, now_s: float) -> Pairing:
    """Pure: `history` is read only; who carries the moves out notes them there. Whatever is decided respects the bounds
    of moves at a time, with those under way that the view tells of."""
    look = Round(view, rules, history, now_s)
    for purpose, rule in _RULES.items():
        if purpose in rules.purposes:
            rule(look)
    return look.outcome()


# --- a worker drains ----------------------------------------------------------------------------------


def _drain(look: Round) -> None:
    view = look.view
    anybody = np.ones(len(view), np.bool_)
    for source in _rising(look, view.is_draining & view.writes & ~view.keeps_answers):
        while look.may_give(source):
            victim = _preempted(look, source) or look.victim(source)
            if victim is None:
                break
            taker = look.destination(source, victim, anybody, is_urgent=True)
            if taker is None:
                break
            reason = f"{_name(look, source)} is draining; {_stands(look, taker)}"
            look.move(source, taker, victim, "draining", reason, below_level=None)
    _move_prompts_of(look, view.is_draining, "draining")


# --- answers, for others' sake ------------------------------------------------------------------------


def _relieve_memory(look: Round) -> None:
    view = look.view
    short = look.available < look.growth * look.num_answers
    for source in _rising(look, _givers(look) & ((view.preempted_answers > 0) | short)):
        while look.may_give(source):
            victim = _preempted(look, source)
            if victim is None and look.available[source] >= look.growth[source] * look.num_answers[source]:
                break
            why = (
                f"{_name(look, source)} has {look.preempted[source]} preempted answers and "
                f"{look.available[source]:.0f} blocks available for {look.num_answers[source]}"
            )
            if not _give(look, source, victim, "memory", why, look.low, is_urgent=True):
                break


def _isolate(look: Round) -> None:
    """Where there would be enough but for the headroom."""
    kept = ((look.headroom > 0) & (look.answers > 0)) * look.headroom
    without = _each(look.free + kept.sum(axis=1), look)
    lacks = (look.pressed() < look.low) & (without >= look.low) & (kept.sum(axis=1) > 0)
    for source in _rising(look, _givers(look) & lacks):
        lowest = int((kept[source] > 0).argmax())
        while look.may_give(source) and look.stand(source) < look.low[source]:
            why = f"{_stands(look, source)} with {kept[source].sum():.0f} blocks kept for higher priorities"
            if not _give(look, source, None, "priority", why, look.high, below_level=lowest):
                break


def _balance(look: Round) -> None:
    for source in _rising(look, _givers(look) & (look.pressed() < look.low)):
        while look.may_give(source) and look.stand(source) < look.low[source]:
            why = f"{_stands(look, source)}, fewer than {look.low[source]:.3g}"
            if not _give(look, source, None, "balance", why, look.high):
                break


def _defragment(look: Round) -> None:
    view = look.view
    missing = _missing(look)
    waits = _givers(look) & (view.head_blocks > 0) & ((missing > 0) | (view.preempted_answers > 0))
    rows = list(_rising(look, waits, missing))
    left = [source for source in rows if not _send_on(look, source, waits)]
    for source in left:
        # Where all prompts were asked to go, what was told of the first in line is out of date.
        is_waiting = look.waiting_prompts[source] > 0 or not view.head_moves[source]
        if is_waiting and not view.preempted_answers[source]:
            _make_room(look, source, waits)


def _send_on(look: Round, source: int, waits: Flags) -> bool:
    """Prompts wait for blocks here: who can be read somewhere at once goes there. Whether the first does."""
    view = look.view
    head = view.head_blocks.item(source) if view.head_moves[source] and not view.preempted_answers[source] else 0
    others = look.waiting_prompts.item(source) - (1 if head else 0)
    behind = max(0, view.queued_blocks.item(source) - view.head_blocks.item(source))
    mean = max(1.0, behind / others) if others > 0 else math.inf
    takers = (view.kv_class == view.kv_class[source]) & view.reads & view.writes & view.is_up & ~view.is_draining
    takers &= ~waits & ~look.are_sources & (view.preempted_answers == 0) & ~look.kept_apart(source, is_urgent=False)
    room, is_head_sent = look.room(), False
    for taker in _rising(look, takers & (room >= 1.0), -room):
        if not (head or others > 0) or not look.may_give_prompt(source):
            break
        room_blocks = int(room[taker])
        takes_head = 0 < head <= room_blocks
        blocks = float(head) if takes_head else 0.0
        behind_it = max(0, min(others, look.rules.max_prompts, int((room_blocks - blocks) / mean)))
        number = behind_it + takes_head
        if not number:
            break
        if behind_it:
            blocks += behind_it * mean
        why = f"{view.head_blocks.item(source)} blocks are wanted at {_name(look, source)}, where"
        reason = f"{why} {look.available[source]:.0f} are available; {_name(look, taker)} has room for {room_blocks}"
        look.send_on(source, taker, number, round(blocks), room_blocks, reason)
        others -= behind_it
        if takes_head:
            head, is_head_sent = 0, True
    return is_head_sent


def _make_room(look: Round, source: int, waits: Flags) -> None:
    """The first in line fits nowhere: answers leave, so that it fits here."""
    view = look.view
    head = view.head_blocks.item(source)
    kind = _givers(look) & (view.kv_class == view.kv_class[source]) & (view.preempted_answers == 0) & ~waits
    kind[source] = False
    while look.may_give(source):
        missing = float(_missing(look)[source])
        if missing <= 0:
            return
        spare = np.where(kind & ~look.are_sources, np.maximum(look.room() - look.growth, 0.0), 0.0)
        if missing > spare.sum():
            look.stays("not_enough")
            return
        can = np.where(look.in_left > 0, spare, 0.0)
        taker = int(can.argmax())
        room_blocks = int(can[taker])
        if room_blocks < 1:
            look.stays("busy")
            return
        victim = look.victim(source)
        if victim is None:
            look.stays("nothing_to_move")
            return
        num_blocks = min(room_blocks, max(victim.num_blocks, int(missing)))
        victim = victim._replace(num_blocks=num_blocks, max_blocks=room_blocks, makes_room=True)
        reason = (
            f"{head} blocks are wanted at {_name(look, source)}, where {look.available[source]:.0f} are available; "
            f"{_name(look, taker)} has room for {room_blocks}"
        )
        look.move(source, taker, victim, "defragment", reason, below_level=None)


def _missing(look: Round) -> Blocks:
    """For the first in line, and for what it and all that run are promised to grow into; a lone one is promised nothing
    (`engine.room.fit`)."""
    promised = np.where(look.num_answers > 0, look.growth * (look.num_answers + 1), 0.0)
    missing: Blocks = look.view.head_blocks + promised - look.available
    return missing


def _give(
    look: Round,
    source: int,
    victim: Victim | None,
    purpose: Purpose,
    why: str,
    above: Blocks,
    *,
    below_level: int | None = None,
    is_urgent: bool = False,
) -> bool:
    """One of those that run there where none that waits is named, to somebody who stands above that; if all are better
    off. Whether it moves."""
    victim = victim or look.victim(source, below_level)
    if victim is None:
        look.stays("nothing_to_move")
        return False
    taker = look.destination(source, victim, look.pressed() > above, is_urgent=is_urgent)
    if taker is None:
        return False
    stood_here, stood_there = look.stand(source), look.stand(taker)
    here, there = look.after(source, taker, victim)
    if not 0 < there - here < stood_there - stood_here and not _ends_a_lack(stood_here, here):
        look.stays("no_gain")
        return False
    if there <= look.low[taker]:
        look.stays("not_free")
        return False
    reason = (
        f"{why}; {_stands(look, taker)}; then {here:.3g} and {there:.3g}"
        f" ({victim.num_blocks} blocks{' that wait' if victim.waits else ''})"
    )
    look.move(source, taker, victim, purpose, reason, below_level=below_level)
    return True


def _ends_a_lack(stood: float, stands: float) -> bool:
    """Whoever lacked blocks lacks none any more: the taker, who stays above `low`, may then have less than it."""
    return stood < 0 <= stands


# --- prompts ------------------------------------------------------------------------------------------


def _move_prompts(look: Round) -> None:
    _move_prompts_of(look, ~look.view.is_draining, "prompts")


def _move_prompts_of(look: Round, rows: Flags, purpose: Purpose) -> None:
    view, rules = look.view, look.rules
    drains = purpose == "draining"
    # Where the first in line waits for blocks, others wait behind it, however short the reading.
    stuck = view.writes & (view.head_blocks > 0) & (_missing(look) > 0)
    anybody = np.ones(len(view), np.bool_) if drains else ~stuck
    waits = rows & view.reads & (view.waiting_prompts > 0) & anybody
    for source in _rising(look, waits, -look.queue_s):
        each_s = look.queue_s.item(source) / view.waiting_prompts.item(source)
        for _ in range(min(view.waiting_prompts.item(source), rules.max_prompts)):
            if not look.may_give_prompt(source):
                break
            taker = look.destination(source, None, anybody, is_urgent=drains)
            if taker is None:
                break
            # The last in line goes, and is the last there.
            gain_s = look.queue_s.item(source) - look.queue_s.item(taker) - each_s
            if not drains and gain_s <= rules.prompt_gain_s:
                look.stays("no_gain")
                break
            why = "is draining" if drains else f"has prompts for {look.queue_s[source]:.3g} s"
            reason = f"{_name(look, source)} {why}, {_name(look, taker)} for {look.queue_s[taker]:.3g} s"
            look.move_prompt(source, taker, each_s, purpose, reason)


# --- words --------------------------------------------------------------------------------------------


def _preempted(look: Round, source: int) -> Victim | None:
    """The preempted answer that is first in line."""
    if not look.preempted[source]:
        return None
    return Victim(_COMMON_LEVEL, max(1, look.view.head_blocks.item(source)), waits=True)


def _givers(look: Round) -> Flags:
    view = look.view
    givers: Flags = view.writes & view.is_up & ~view.is_draining
    return givers


def _each(free: Blocks, look: Round) -> Blocks:
    each: Blocks = free / np.maximum(look.num_answers, 1)
    return each


def _rising(look: Round, rows: Flags, figures: Blocks | None = None) -> Iterable[int]:
    """Those marked, the one with the smallest figure (freeness, if none is given) first."""
    marked = rows.nonzero()[0]
    order = (look.pressed() if figures is None else figures)[marked]
    found: list[int] = marked[np.argsort(order, kind="stable")].tolist()
    return found


def _name(look: Round, row: int) -> str:
    return str(look.view.worker_ids[row])


def _stands(look: Round, row: int) -> str:
    stand, num_answers = look.stand(row), look.num_answers.item(row)
    if stand < 0:
        return f"{_name(look, row)} lacks {-stand:.0f} blocks for {num_answers} answers"
    return f"{_name(look, row)} has {stand:.3g} blocks for each of {num_answers} answers"


_RULES: dict[Purpose, Callable[[Round], None]] = {
    "draining": _drain,
    "memory": _relieve_memory,
    "priority": _isolate,
    "defragment": _defragment,
    "balance": _balance,
    "prompts": _move_prompts,
}
