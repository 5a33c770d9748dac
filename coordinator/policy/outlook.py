"""What can be expected of each worker: when it has read its prompts, and how many answers it will write when.

The columns stand beside those of `FleetView`, row by row. They say something only where costs are known.

**Prompts.** `prefill_free_s` is the time at which a worker will have read all that it was given: a virtual clock. There
is one for each *rank* of urgency, for work of this rank and more urgent ones: where workers read prompts by deadline a
request does not wait for those with longer targets. The wait of a request is the time from now to its rank's.

**Answers.** The expected number of answers that a worker writes at a later time (Mooncake, arXiv 2407.00079, section
7): of those that it writes now each goes on with a probability that falls exponentially, with the mean duration of an
answer as its time constant (lengths are not predicted one by one, and those of chats spread about that much); and those
placed there whose prompts will have been read by then. The latter are tabulated by time, in slots of equal width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from coordinator.policy.pairing import is_all, is_any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from coordinator.policy.cost_tables import CostTables
    from coordinator.policy.fleet_view import Counts, Expected, Flags, Seconds

#: Time slots of the table of placed answers.
NUM_SLOTS = 64
#: No worker reads prompts in more than this share of its steps for long: it would write no answers.
_MOST_READING = 0.95
#: How far back the share of time that workers read prompts is looked at.
READING_WINDOW_S = 10.0
#: No step takes less.
_SHORTEST_STEP_S = 1e-9
#: As arrays: what turns a number into one takes as long as an operation on some dozens of rows.
_ZERO = np.array(0.0)
_ONE = np.array(1.0)
_PER_WINDOW = np.array(1.0 / READING_WINDOW_S)


@dataclass(slots=True, eq=False)
class Slots:
    """The times that the slots of a table stand for: the present, and what follows."""

    width_s: float
    #: Number of the slot that holds the present, counted from time 0.
    first: int = 0

    def index_at(self, at_s: float) -> int:
        """Of the slot that holds a time, or of the nearest there is."""
        return min(max(int(at_s / self.width_s) - self.first, 0), NUM_SLOTS - 1)

    @property
    def end_s(self) -> float:
        return (self.first + NUM_SLOTS) * self.width_s


@dataclass(slots=True, eq=False)
class Pace:
    """Mean over all workers: an answer's tokens, and what each takes."""

    answer_tokens: float
    token_s: float
    #: Of the prompts placed lately; 0: none was.
    prompt_tokens: float = 0.0

    @property
    def answer_s(self) -> float:
        return self.answer_tokens * self.token_s


@dataclass(slots=True, eq=False)
class Copies:
    """Of the budgets of copies."""

    #: The clock that is furthest: `Outlook.replica_free_s` of some worker, maybe of one that has left.
    latest_s: float = 0.0


class ReadGroup(NamedTuple):
    """Workers for which reading a prompt costs the same, and that can fetch the same KV."""

    kind: int
    kv_class: int


def with_rest(turns: Expected) -> Expected:
    """Durations of an answer that are waited for where others stand before, so many for each seat: of those that hold
    the seats half a duration is left on average, and answers that began together end together."""
    rounded: Expected = np.maximum(turns + np.minimum(turns, 0.5), 0.0)
    return rounded


class Decoding(NamedTuple):
    """Answers that workers write at some time, row by row."""

    num_decodes: Expected
    context_tokens: Expected


class Writing(NamedTuple):
    """What one more answer is expected to find on each worker, row by row."""

    tpot_s: Seconds
    room_tokens: Expected
    #: Whether there is room for its prompt and for all of it; a seat.
    has_room: Flags
    has_seat: Flags
    #: As `Outlook.line_s`, where the prompt waits for writers and not for its reader; else None.
    line_s: Seconds | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outlook:
    tables: CostTables
    #: Whether it is known what steps cost of those that read prompts; of those that write answers.
    knows_reading: bool
    knows_writing: bool
    any_mixed: bool
    #: Readers by kind and `kv_class`: the different pairs, and by row which of them (of others that means nothing).
    read_groups: tuple[ReadGroup, ...]
    read_group: Counts
    #: Prompt tokens of a full step, by row.
    budget_tokens: Counts
    #: What such a step takes, without attention; half of that.
    full_step_s: Seconds
    half_step_s: Seconds
    #: Row of `tables` by row, for writing answers. Where nothing is known of a worker it counts as of the kind that
    #: most of its role are; the same for reading.
    write_kind: Counts

    # --- changing with reports and placements ---
    #: `[rank, row]`; never falling with the rank.
    prefill_free_s: Seconds
    #: When the worker's planned fetches from it are over.
    source_free_s: Seconds
    #: The virtual clock of its budget of copies, see `coordinator.policy.sources`.
    replica_free_s: Seconds
    copies: Copies
    #: As reported: answers that are written and their context; KV that is free or waits for prompts still being read;
    #: KV that is that or these answers'.
    num_decodes: Expected
    context_tokens: Expected
    free_tokens: Expected
    open_tokens: Expected
    #: Answers that it will write and of which it does not tell yet: readers told of their prompts, or they were placed
    #: just now.
    unread_answers: Expected
    booked_answers: Expected
    #: Offers of answers for which there are no blocks.
    waiting_offers: Expected
    #: KV of prompts that were read and that their writers have not taken; how much of it may wait until the worker
    #: reads on for other workers; all that its blocks hold.
    untaken_tokens: Expected
    handoff_tokens: Expected
    total_tokens: Expected
    #: What the smaller of these last two leaves beside what is not taken.
    spare_tokens: Expected
    #: Answers that it writes at the same time: as many as its steps hold, or as have blocks where these are taken.
    seats: Expected
    #: `[row, slot, 0 or 1]`: answers expected to be written at the slot's time; their context tokens. In memory the
    #: rows of one slot stand side by side, for decisions look at one slot at a time.
    decoding: NDArray[np.float64]
    slots: Slots
    pace: Pace
    #: Seconds of reading placed there within `READING_WINDOW_S`, fading, as of a time.
    reading_s: Seconds
    reading_as_of_s: Seconds

    def queue_s(self, rank: int, now_s: float) -> Seconds:
        """What a request of this rank would wait for others' prompts."""
        seconds: Seconds = self.prefill_free_s[rank] - now_s
        np.maximum(seconds, _ZERO, out=seconds)
        return seconds

    def company_s(self, queue_s: Seconds, now_s: float) -> Seconds:
        """What the last step of a prompt that waits so long takes longer for prompts that came after it: they fill
        that step as far as it has room, half of it on average, and as far as they come in time."""
        coming_s: Seconds = self.reading_as_of_s - now_s
        coming_s *= _PER_WINDOW
        np.exp(coming_s, out=coming_s)
        coming_s *= queue_s
        coming_s *= self.reading_s
        coming_s *= _PER_WINDOW
        np.minimum(coming_s, self.half_step_s, out=coming_s)
        return coming_s

    def company_at_s(self, row: int, queue_s: float, now_s: float) -> float:
        """The same for one worker."""
        if not queue_s:
            return 0.0
        fade = math.exp((self.reading_as_of_s.item(row) - now_s) / READING_WINDOW_S)
        coming_s = queue_s * self.reading_s.item(row) * fade * (1.0 / READING_WINDOW_S)
        return min(coming_s, 0.5 * self.full_step_s.item(row))

    def decoding_at(self, at_s: float) -> Decoding:
        """What is expected then, or at the nearest time that is looked ahead to."""
        then = self.decoding[:, self.slots.index_at(at_s)]
        return Decoding(then[:, 0], then[:, 1])

    def step_extra_s(self, decoding: Decoding) -> Seconds:
        """What the decodes of mixed workers add to each of their steps with a full chunk."""
        kind = self.write_kind
        sizes = np.minimum(decoding.num_decodes + 0.5, self.tables.beside_s.shape[1] - 1).astype(np.intp)
        context_s = self.tables.decode_context_s[kind, sizes] * decoding.context_tokens
        extra_s: Seconds = self.tables.beside_s[kind, sizes] + context_s
        return extra_s

    def reading_share(self, now_s: float) -> Seconds:
        """Of a mixed worker's time: what it reads prompts for."""
        fade = np.exp((self.reading_as_of_s - now_s) / READING_WINDOW_S)
        return np.minimum(self.reading_s * fade / READING_WINDOW_S, _MOST_READING)

    def line_s(self, now_s: float, is_mixed: Flags | None) -> Seconds:
        """Until one more answer had a seat if it came last of all that are told or placed, on each worker."""
        in_line = self.num_decodes + self.unread_answers + self.booked_answers + 1.0 - self.seats
        token_s = self.token_s(Decoding(self.num_decodes, self.context_tokens), now_s, is_mixed)
        line_s: Seconds = np.maximum(in_line, 0.0) * (self.pace.answer_tokens * token_s / self.seats)
        return line_s

    def tokens_room(self, decoding: Decoding) -> Expected:
        """Tokens of KV that will be free then: what is now, and what will have been given back. Less than none where
        answers wait for blocks."""
        return self.open_tokens - decoding.context_tokens

    def tpot_s(
        self,
        decoding: Decoding,
        prompt_tokens: int,
        answer_tokens: float,
        now_s: float,
        is_mixed: Flags | None,
    ) -> Seconds:
        """Of one more answer, on each worker: a step with it in the midst of its length, and what it waits for a seat
        and for blocks where those are taken, spread over its tokens. `is_mixed` by row; None: nobody is."""
        return self.with_one_more(decoding, prompt_tokens, answer_tokens, now_s, is_mixed).tpot_s

    def with_one_more(
        self, decoding: Decoding, prompt_tokens: int, answer_tokens: float, now_s: float, is_mixed: Flags | None
    ) -> Writing:
        """As `tpot_s`, and what that follows from."""
        num_decodes = decoding.num_decodes + _ONE
        has_seat = num_decodes <= self.seats
        are_seated = is_all(has_seat)
        room_tokens = self.tokens_room(decoding)
        has_room = room_tokens >= prompt_tokens + answer_tokens
        joined = Decoding(num_decodes, decoding.context_tokens + (prompt_tokens + 0.5 * answer_tokens))
        step_s = self.token_s(joined, now_s, is_mixed, are_seated=are_seated)
        if not are_seated or not is_all(has_room):
            # Both come free as answers end: each worker's all within the duration of one.
            missing = prompt_tokens + answer_tokens - room_tokens
            held = np.minimum(np.maximum(decoding.context_tokens, 1.0), self.total_tokens)
            turns = np.maximum(np.maximum(missing, 0.0) / held, with_rest((num_decodes - self.seats) / self.seats))
            step_s = step_s + turns * (self.pace.answer_s / max(answer_tokens - 1.0, 1.0))
        return Writing(step_s, room_tokens, has_room, has_seat)

    def token_s(self, decoding: Decoding, now_s: float, is_mixed: Flags | None, *, are_seated: bool = False) -> Seconds:
        """From one token of an answer with a seat to its next. `is_mixed` as for `tpot_s`; `are_seated`: it is known
        that there are seats for all."""
        num_decodes, context_tokens = decoding
        if not are_seated and is_any(num_decodes > self.seats):
            seated = np.minimum(num_decodes, self.seats)
            context_tokens = context_tokens * (seated / np.maximum(num_decodes, 1.0))
            num_decodes = seated
        step_s = self.tables.decode_step_s(self.write_kind, num_decodes, context_tokens)
        return step_s if is_mixed is None else self._beside_chunks(step_s, decoding, now_s, is_mixed)

    def _beside_chunks(self, step_s: Seconds, decoding: Decoding, now_s: float, is_mixed: Flags) -> Seconds:
        """Mean over steps that only decode and steps that read prompts too."""
        # Of workers that do not write it may be unknown.
        step_s = np.maximum(step_s, _SHORTEST_STEP_S)
        chunk_s = self.full_step_s + self.step_extra_s(decoding)
        share = self.reading_share(now_s) * is_mixed
        return 1.0 / (share / np.maximum(chunk_s, step_s) + (1.0 - share) / step_s)
