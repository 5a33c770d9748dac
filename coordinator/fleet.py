"""The columns that dispatch decides over, kept up to date: who is live, what they reported, what was placed since.

A placement counts as load until its worker's own figures contain it: until the first report that is at least
`booking_grace_s` younger. Reports and placements cost the same however many workers there are; only a worker that
comes or goes moves the rows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from coordinator.expectations import Expectations
from coordinator.policy.fleet_view import count_of, decode_tokens, find_row, prefill_tokens, view_of
from coordinator.policy.virtual_usage import UsageRules, unclaimed
from kvstore.block_keys import HINT_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.ids import WorkerId
    from contracts.messages import DispatchItem, WorkerInfo, WorkerLoad
    from coordinator.answer_lengths import AnswerLengths
    from coordinator.costs import WorkerCosts
    from coordinator.decision import Plan
    from coordinator.policy.fleet_view import Counts, FleetView
    from coordinator.policy.outlook import Outlook


class _Booking(NamedTuple):
    at_s: float
    prefill_tokens: int
    decode_tokens: int
    requests: int
    prefill_s: float
    #: Of the prompt whose answer is written there.
    claimed_tokens: int = 0
    answers: int = 0
    #: Hints of all full blocks of the prompt that is read there; none where they are not known.
    block_keys: bytes = b""


@dataclass(slots=True)
class _Bookings:
    """One worker's placements that no report contains yet, oldest first, and their sums."""

    queue: deque[_Booking] = field(default_factory=deque[_Booking])
    prefill_tokens: int = 0
    decode_tokens: int = 0
    requests: int = 0
    prefill_s: float = 0.0
    claimed_tokens: int = 0
    answers: int = 0

    def add(self, booking: _Booking) -> None:
        self.queue.append(booking)
        self.prefill_tokens += booking.prefill_tokens
        self.decode_tokens += booking.decode_tokens
        self.requests += booking.requests
        self.prefill_s += booking.prefill_s
        self.claimed_tokens += booking.claimed_tokens
        self.answers += booking.answers

    def settle(self, until_s: float) -> None:
        """Forgets those made until then."""
        queue = self.queue
        while queue and queue[0].at_s <= until_s:
            self._take_off(queue.popleft())

    def take_out(self, booking: _Booking) -> None:
        """Forgets this one, which is here."""
        self.queue.remove(booking)
        self._take_off(booking)

    def _take_off(self, booking: _Booking) -> None:
        self.prefill_tokens -= booking.prefill_tokens
        self.decode_tokens -= booking.decode_tokens
        self.requests -= booking.requests
        self.prefill_s -= booking.prefill_s
        self.claimed_tokens -= booking.claimed_tokens
        self.answers -= booking.answers
        if not self.queue:
            # Sums of fractions leave a rest.
            self.prefill_s = 0.0


class Fleet:
    """Rows stand in order of worker id and keep their number until a worker comes or goes."""

    def __init__(
        self,
        booking_grace_s: float,
        *,
        num_ranks: int = 1,
        longest_wait_s: float = 0.0,
        usage: UsageRules | None = None,
    ) -> None:
        """`num_ranks`: of urgency (see `Outlook`). Who waits longer than `longest_wait_s` misses any target. `usage`:
        what counts as used of a worker's memory; None: as is usual."""
        self._booking_grace_s = booking_grace_s
        self._usage = usage or UsageRules()
        # Parallel, by worker id.
        self._infos: list[WorkerInfo] = []
        self._bookings: list[_Bookings] = []
        self._told: list[WorkerLoad | None] = []
        self._told_s: list[float] = []
        self._numbers: list[int] = []
        self._prefill_load_tokens = np.zeros(0, np.int64)
        self._decode_load_tokens = np.zeros(0, np.int64)
        self._waiting_requests = np.zeros(0, np.int64)
        self._unclaimed_tokens = np.zeros(0, np.int64)
        self._num_answers = np.zeros(0, np.int64)
        self._expectations = Expectations(num_ranks, longest_wait_s)
        #: Made when asked for after a worker came or went.
        self._view: FleetView | None = None
        self._numbers_by_row: Counts | None = None

    def __len__(self) -> int:
        return len(self._infos)

    def row_of(self, worker_id: WorkerId) -> int:
        """Raises KeyError when the worker is not here."""
        row, is_here = find_row(worker_id, self._infos)
        if not is_here:
            raise KeyError(worker_id)
        return row

    def number_of(self, worker_id: WorkerId) -> int:
        """Its number in the prefix directory. Raises KeyError when the worker is not here."""
        return self._numbers[self.row_of(worker_id)]

    def info_at(self, row: int) -> WorkerInfo:
        return self._infos[row]

    @property
    def loads(self) -> Sequence[WorkerLoad | None]:
        """By row, as told last; None: nothing was told yet."""
        return self._told

    def add(self, info: WorkerInfo, now_s: float = 0.0, *, number: int = 0, costs: WorkerCosts | None = None) -> None:
        """A worker without load. `number`: in the prefix directory. Raises ValueError when it is here already."""
        row, is_here = find_row(info.worker_id, self._infos)
        if is_here:
            raise ValueError(f"worker {info.worker_id} is in the fleet already")
        self._infos.insert(row, info)
        self._bookings.insert(row, _Bookings())
        self._told.insert(row, None)
        self._told_s.insert(row, now_s)
        self._prefill_load_tokens = np.insert(self._prefill_load_tokens, row, 0)
        self._decode_load_tokens = np.insert(self._decode_load_tokens, row, 0)
        self._waiting_requests = np.insert(self._waiting_requests, row, 0)
        all_tokens = count_of(info.total_blocks) * info.identity.layout.block_tokens
        self._unclaimed_tokens = np.insert(self._unclaimed_tokens, row, count_of(all_tokens))
        self._num_answers = np.insert(self._num_answers, row, 0)
        self._numbers.insert(row, number)
        self._view = self._numbers_by_row = None
        self._expectations.insert(row, info, now_s)
        self._expectations.set_costs(row, costs)

    def remove(self, worker_id: WorkerId) -> None:
        """Raises KeyError when the worker is not here."""
        row = self.row_of(worker_id)
        del self._infos[row], self._bookings[row], self._told[row], self._told_s[row]
        self._prefill_load_tokens = np.delete(self._prefill_load_tokens, row)
        self._decode_load_tokens = np.delete(self._decode_load_tokens, row)
        self._waiting_requests = np.delete(self._waiting_requests, row)
        self._unclaimed_tokens = np.delete(self._unclaimed_tokens, row)
        self._num_answers = np.delete(self._num_answers, row)
        del self._numbers[row]
        self._view = self._numbers_by_row = None
        self._expectations.delete(row)

    def set_costs(self, row: int, costs: WorkerCosts | None) -> None:
        """What the worker's steps cost from now on; None: nothing is known."""
        self._expectations.set_costs(row, costs)

    def report(self, row: int, load: WorkerLoad, now_s: float) -> None:
        """A worker's own figures, as of now. Times of calls must not go backwards."""
        if self._infos[row].role == "store":
            # Nothing is placed there, and nothing is expected of it.
            return
        bookings = self._bookings[row]
        self._told_s[row] = now_s
        if bookings.queue:
            bookings.settle(now_s - self._booking_grace_s)
        elif self._expectations.says_nothing(row, load, now_s) and load == self._told[row]:
            return
        self._told[row] = load
        self._prefill_load_tokens[row] = count_of(load.pending_prompt_tokens) + bookings.prefill_tokens
        self._decode_load_tokens[row] = count_of(load.context_tokens) + bookings.decode_tokens
        self._waiting_requests[row] = count_of(load.waiting_requests) + bookings.requests
        info = self._infos[row]
        unclaimed_blocks = unclaimed(load, self._usage, info.total_blocks, info.identity.layout.block_tokens)
        self._unclaimed_tokens[row] = unclaimed_blocks * info.identity.layout.block_tokens - bookings.claimed_tokens
        self._num_answers[row] = count_of(load.running_decodes) + bookings.answers
        self._expectations.report(row, load, bookings.prefill_s, len(bookings.queue), self._view or self.view(), now_s)

    def book(
        self, item: DispatchItem, prefill_row: int, decode_row: int, now_s: float, plan: Plan | None = None
    ) -> None:
        """Counts a placement as load from now on, until reports contain it. `plan`: None where nothing is predicted."""
        to_prefill, to_decode = prefill_tokens(item), decode_tokens(item)
        prefill_s = 0.0 if plan is None else plan.prefill_s
        num_blocks = item.prompt_tokens // self._infos[prefill_row].identity.layout.block_tokens
        block_keys = item.block_keys if len(item.block_keys) == num_blocks * HINT_BYTES else b""
        self._bookings[prefill_row].add(_Booking(now_s, to_prefill, 0, 1, prefill_s, block_keys=block_keys))
        self._bookings[decode_row].add(_Booking(now_s, 0, to_decode, 0, 0.0, to_prefill, 1))
        self._prefill_load_tokens[prefill_row] += to_prefill
        self._waiting_requests[prefill_row] += 1
        self._decode_load_tokens[decode_row] += to_decode
        self._unclaimed_tokens[decode_row] -= to_prefill
        self._num_answers[decode_row] += 1
        self._expectations.note_placed(item)
        if plan is not None:
            self._expectations.book(item, prefill_row, decode_row, plan, now_s)

    def note_held(self, row: int, block_keys: bytes) -> None:
        """The worker holds the blocks of these hints: who was placed there with a prompt that ends within them has been
        read, and waits no more, whatever was reported meanwhile."""
        bookings = self._bookings[row]
        for booking in [one for one in bookings.queue if one.block_keys and block_keys.startswith(one.block_keys)]:
            bookings.take_out(booking)
            # What was reported since it was placed contains it too.
            times = 2 if self._told_s[row] >= booking.at_s else 1
            left_tokens = self._prefill_load_tokens.item(row) - times * booking.prefill_tokens
            self._prefill_load_tokens[row] = max(left_tokens, bookings.prefill_tokens)
            self._waiting_requests[row] -= booking.requests

    def view(self) -> FleetView:
        """A window: it shows what is reported and booked later too. Stale once a worker came or went."""
        if self._view is None:
            self._view = view_of(
                self._infos,
                prefill_load_tokens=self._prefill_load_tokens,
                decode_load_tokens=self._decode_load_tokens,
                waiting_requests=self._waiting_requests,
                unclaimed_tokens=self._unclaimed_tokens,
                num_answers=self._num_answers,
            )
        return self._view

    def outlook(self) -> Outlook:
        """A window too. Stale once a worker came or went or costs something else."""
        return self._expectations.outlook(self.view())

    def numbers(self) -> Counts:
        """By row: numbers in the prefix directory."""
        if self._numbers_by_row is None:
            self._numbers_by_row = np.array(self._numbers, np.int64)
        return self._numbers_by_row

    @property
    def answer_lengths(self) -> AnswerLengths:
        return self._expectations.answer_lengths
