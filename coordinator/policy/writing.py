"""Which decode worker writes an answer, by predicted TPOT and room for its KV.

`spread`: the lowest predicted TPOT with this answer added, so that all stay fast. `pack`: the highest that still meets
the request's target, so that other workers stay free (Llumnix calls it bin-packing under the SLO); without a target,
or where nobody meets it, as `spread`. Among workers that will have a seat, and room for the prompt and the expected
answer; where none has both, `spread` among those with room; where none has that, the one with the most.

Of those that are nearly as good, the one that holds most of the prompt: what it holds need not be handed over. That
spares the network and nothing else, so it is no more than a tie-break; and as each answer makes its worker slower,
conversations with one beginning do not gather.

Where readers are held up by writers that have no room, nobody can tell when an answer would begin, and a prompt whose
writer is full keeps those behind it from another that is idle. Then the shortest line counts: of all answers told or
placed, for the seats that there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from coordinator.policy.pairing import fewest_wishes_dropped, is_any, least, most

if TYPE_CHECKING:
    from typing import Literal

    from coordinator.policy.fleet_view import Counts, Flags, FleetView, Seconds
    from coordinator.policy.outlook import Outlook, Writing
    from coordinator.policy.question import Candidates, Question


#: Relative: figures that are so near are alike.
_NEARLY = 0.03


def writing_at(
    question: Question, view: FleetView, outlook: Outlook, begin_s: float, *, is_held_up: bool = False
) -> Writing:
    """`is_held_up`: the prompt waits for writers."""
    is_mixed = view.is_mixed if outlook.any_mixed else None
    writing = outlook.with_one_more(
        outlook.decoding_at(begin_s), question.item.prompt_tokens, question.answer_tokens, question.now_s, is_mixed
    )
    return writing._replace(line_s=outlook.line_s(question.now_s, is_mixed)) if is_held_up else writing


def choose_writer(
    question: Question,
    view: FleetView,
    found: Candidates,
    writing: Writing,
    writers: Flags,
    way: Literal["spread", "pack"],
) -> int:
    """Of these, at least one."""
    writers = fewest_wishes_dropped(question, view, found, writers)
    if writing.line_s is not None:
        return least(writing.line_s, writers)
    roomy = writers & writing.has_room
    if not is_any(roomy):
        return most(writing.room_tokens, writers)
    seated = roomy & writing.has_seat
    if not is_any(seated):
        return least(writing.tpot_s, roomy)
    roomy = seated
    if way == "pack" and question.tpot_limit_s is not None:
        in_time = roomy & (writing.tpot_s <= question.tpot_limit_s)
        if is_any(in_time):
            return holding_most(question, writing.tpot_s, most(writing.tpot_s, in_time), in_time)
    return holding_most(question, writing.tpot_s, least(writing.tpot_s, roomy), roomy)


def holding_most(question: Question, figures: Counts | Seconds, best: int, candidates: Flags) -> int:
    """Of the candidates whose figures are nearly that of the best one, the one that holds most of the prompt; of equal
    ones the nearest to the best, which goes first itself."""
    if question.held is None or not question.is_kept:
        return best
    held = question.held * candidates
    if not np.count_nonzero(held):
        return best
    figure = figures.item(best)
    apart = np.abs(figures - figure)
    held = held * (apart <= _NEARLY * abs(figure))
    most_blocks = int(held.max())
    if held.item(best) == most_blocks:
        return best
    return least(apart, held == most_blocks)
