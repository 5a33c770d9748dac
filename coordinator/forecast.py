"""How many answers each worker is expected to write when: those it reported, and those placed there since.

A table by time slot, as `coordinator.policy.outlook` reads it. A placement adds to the slots after its beginning, a
report makes those of its worker anew; both cost the same however many placements there are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from coordinator.policy.outlook import NUM_SLOTS, Pace, Slots
from coordinator.policy.pairing import is_any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from coordinator.policy.fleet_view import Seconds

#: Slots reach at least so far, and this much further than a request may wait where it still meets its target.
_SHORTEST_HORIZON_S = 8.0
_HORIZON_OVER_TARGET = 1.5
#: A pace that differs by less is the same.
_SAME = 0.01
_ZERO = np.array(0.0)
_AGES: Seconds = np.arange(NUM_SLOTS, dtype=np.float64)
#: Slots from one (by column) to another (by row), and whether that is not before the first.
_LAGS = np.maximum(np.subtract.outer(np.arange(NUM_SLOTS), np.arange(NUM_SLOTS)), 0)
_IS_AFTER = np.tri(NUM_SLOTS)


class DecodeForecast:
    """Rows are those of the fleet."""

    def __init__(self, longest_wait_s: float, pace: Pace) -> None:
        """`pace` changes as more is known; what it is when a worker reports holds until the next report."""
        horizon_s = max(_SHORTEST_HORIZON_S, _HORIZON_OVER_TARGET * longest_wait_s)
        self.slots = Slots(width_s=horizon_s / NUM_SLOTS)
        #: As `Outlook.decoding`: a view of what is `[slot, 0 or 1, row]` in memory.
        self.table: NDArray[np.float64] = _by_row(np.zeros((NUM_SLOTS, 2, 0)))
        #: `[row, slot, 0 or 1]`, in memory too: answers that no report contains and that begin in the slot; tokens of
        #: their prompts.
        self._begins: NDArray[np.float64] = np.zeros((0, NUM_SLOTS, 2))
        self._reported_s: list[float] = []
        #: By row: whether anything may stand in `_begins`.
        self._expects: list[bool] = []
        #: By row: number of the first slot, counted from time 0, in which nobody is expected to wait for a seat.
        self._crowded_until: list[int] = []
        #: By row: whether nothing but zeros stands in the table.
        self._is_blank: list[bool] = []
        self._pace = pace
        #: Seconds and tokens of an answer that `_stay` and `_grown` were made for.
        self._seen = math.nan, math.nan
        self._look_at_pace()

    def insert(self, row: int, now_s: float) -> None:
        self.table = _by_row(np.insert(_by_slot(self.table), row, 0.0, axis=2))
        self._begins = np.insert(self._begins, row, 0.0, axis=0)
        self._reported_s.insert(row, now_s)
        self._expects.insert(row, False)
        self._crowded_until.insert(row, 0)
        self._is_blank.insert(row, True)

    def delete(self, row: int) -> None:
        self.table = _by_row(np.delete(_by_slot(self.table), row, axis=2))
        self._begins = np.delete(self._begins, row, axis=0)
        del self._reported_s[row], self._expects[row], self._crowded_until[row], self._is_blank[row]

    def advance(self, now_s: float) -> None:
        """Slots that are over make room for later ones. To be called before `add` and `report` at a new time."""
        slots = self.slots
        number = int(now_s / slots.width_s)
        passed = number - slots.first
        if passed <= 0:
            return
        slots.first = number
        if passed >= NUM_SLOTS:
            # All that was placed has begun; of the answers in the last slot some have ended since.
            self._begins[:] = 0.0
            self.table[:] = self.table[:, -1:] * math.exp((NUM_SLOTS - 1 - passed) * slots.width_s / self._seen[0])
            return
        self._begins[:, :-passed] = self._begins[:, passed:]
        self._begins[:, -passed:] = 0.0
        # Until the next reports, what lies beyond the last slot looks like the last.
        self.table[:, :-passed] = self.table[:, passed:]
        self.table[:, -passed:] = self.table[:, -1:]

    def add(self, row: int, begin_s: float, prompt_tokens: int) -> None:
        """One more answer, from then on."""
        first = self.slots.index_at(begin_s)
        begins = self._begins[row, first]
        begins[0] += 1.0
        begins[1] += prompt_tokens
        self._expects[row] = True
        self._is_blank[row] = False
        if (seated := self._crowded_until[row] - self.slots.first) > first:
            # It waits among the others before it gets on.
            self.table[row, first:seated] += (1.0, prompt_tokens)
            first = min(seated, NUM_SLOTS)
        num_after = NUM_SLOTS - first
        more = self._of_token[:num_after] * float(prompt_tokens)
        more += self._of_one[:num_after]
        column = self.table[row, first:]
        column += more

    def report(self, row: int, num_decodes: int, context_tokens: int, now_s: float, seats: float = math.inf) -> None:
        """The worker's figures contain what began before now. It writes `seats` answers at a time, at most."""
        self._look_at_pace()
        last_s, self._reported_s[row] = self._reported_s[row], now_s
        expects = self._expects[row]
        if expects:
            self._let_begin(row, last_s, now_s)
            expects = self._expects[row]
        self._crowded_until[row] = 0
        column = self.table[row]
        if expects:
            # What is written already is like what begins now.
            begins = self._begins[row].flatten()
            begins[0] += num_decodes
            begins[1] += context_tokens
            column[:] = (self._after @ begins).reshape(column.shape)
        else:
            self._write_down(row, num_decodes, context_tokens)
            if num_decodes <= seats:
                return
        if is_any(column[:, 0] > seats):
            self._queue_for_seats(row, num_decodes, context_tokens, seats, column)
        self._is_blank[row] = False

    def _write_down(self, row: int, num_decodes: int, context_tokens: int) -> None:
        """There are these answers and no others."""
        if num_decodes or context_tokens:
            column = self.table[row]
            np.multiply(self._of_one, float(num_decodes), column)
            tokens = column[:, 1]
            tokens += self._stay * float(context_tokens)
            self._is_blank[row] = False
        elif not self._is_blank[row]:
            self.table[row] = 0.0
            self._is_blank[row] = True

    def _queue_for_seats(
        self, row: int, num_decodes: int, context_tokens: int, seats: float, column: NDArray[np.float64]
    ) -> None:
        """Only those with a seat get on, so that no more than these end within the duration of one: a queue that is
        served at that rate, or what there would be with seats for all, whichever is longer."""
        begun = self._begins[row].cumsum(axis=0)
        begun += (num_decodes, context_tokens)
        queue = begun[:, 0] - self._ages * seats
        is_longer = queue > column[:, 0]
        # Whoever waits does not grow, and whoever comes takes the place of one that has grown.
        column[is_longer, 1] = queue[is_longer] * (begun[is_longer, 1] / begun[is_longer, 0])
        column[is_longer, 0] = queue[is_longer]
        self._crowded_until[row] = self.slots.first + int(np.count_nonzero(queue > seats))

    def _let_begin(self, row: int, last_s: float, now_s: float) -> None:
        """Of the present slot's some have begun since the last report: as many as of its time has passed."""
        slots, begins = self.slots, self._begins[row]
        slot_end_s = (slots.first + 1) * slots.width_s
        counted_from_s = max(last_s, slots.first * slots.width_s)
        if now_s > counted_from_s:
            begins[0] *= max(0.0, slot_end_s - now_s) / (slot_end_s - counted_from_s)
        self._expects[row] = is_any(begins[:, 0] != _ZERO)

    def _look_at_pace(self) -> None:
        """By slots since an answer began: the probability that it is still written; times its expected tokens."""
        pace = self._pace
        answer_s, tokens = pace.answer_tokens * pace.token_s, pace.answer_tokens
        seen_s, seen_tokens = self._seen
        if abs(answer_s - seen_s) <= _SAME * answer_s and abs(tokens - seen_tokens) <= _SAME * tokens:
            return
        self._seen = answer_s, tokens
        #: Durations of an answer, by slots since it began.
        ages = self._ages = _AGES * (self.slots.width_s / answer_s)
        self._stay: Seconds = np.exp(-ages)
        self._grown: Seconds = self._stay * ages * tokens
        self._of_one = np.stack((self._stay, self._grown), axis=1)
        self._of_token = np.stack((np.zeros(NUM_SLOTS), self._stay), axis=1)
        #: The same as a matrix: from what begins in each slot to what that comes to in each.
        after = np.zeros((NUM_SLOTS, 2, NUM_SLOTS, 2))
        after[:, 0, :, 0] = after[:, 1, :, 1] = self._stay[_LAGS] * _IS_AFTER
        after[:, 1, :, 0] = self._grown[_LAGS] * _IS_AFTER
        self._after = after.reshape(2 * NUM_SLOTS, 2 * NUM_SLOTS)


def _by_row(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """A view by row of a table by slot."""
    return table.transpose(2, 0, 1)


def _by_slot(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """The other way round."""
    return table.transpose(1, 2, 0)
