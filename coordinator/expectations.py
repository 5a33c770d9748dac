"""The columns of `coordinator.policy.outlook`, kept up to date: what is expected of workers whose costs are known.

When a worker will have read its prompts is believed, between reports, as placements add up. A report bounds it: there
is at least what it tells, and at most that and what was placed within the grace before it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from coordinator.answer_lengths import AnswerLengths
from coordinator.forecast import DecodeForecast
from coordinator.pace import PaceKeeper
from coordinator.policy.cost_tables import CostTable, stack
from coordinator.policy.fleet_view import LARGEST_COUNT, count_of, find_row
from coordinator.policy.outlook import READING_WINDOW_S, Copies, Outlook, ReadGroup

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from numpy.typing import NDArray

    from contracts.ids import WorkerId
    from contracts.messages import AnswerTally, DispatchItem, WorkerInfo, WorkerLoad
    from coordinator.costs import WorkerCosts
    from coordinator.decision import Plan
    from coordinator.policy.fleet_view import Counts, FleetView, Seconds

#: How much an earlier figure of seats counts beside a later, smaller one.
_PAST_SHARE = 0.5
#: From one report to the next, where blocks are not all taken any more.
_MORE_SEATS = 1.25
#: Tables of costs that no worker has any more go when there are so many.
_MAX_TABLES = 256

_COLUMNS = (
    "source_free_s",
    "replica_free_s",
    "num_decodes",
    "context_tokens",
    "free_tokens",
    "open_tokens",
    "unread_answers",
    "booked_answers",
    "waiting_offers",
    "untaken_tokens",
    "handoff_tokens",
    "total_tokens",
    "spare_tokens",
    "seats",
    "reading_s",
    "reading_as_of_s",
)


class Expectations:
    """Rows are those of the fleet, which tells of every change."""

    def __init__(self, num_ranks: int, longest_wait_s: float) -> None:
        self._infos: list[WorkerInfo] = []
        #: By row; None: nothing is known of its steps.
        self._tables: list[CostTable | None] = []
        #: By identity of the costs that they were made of.
        self._made: dict[int, CostTable] = {}
        #: By row: as told last, and their tokens.
        self._told_answers: list[Sequence[AnswerTally]] = []
        self._told_tokens: list[int] = []
        self._told_unread: list[tuple[tuple[WorkerId, int], ...]] = []
        self._columns: dict[str, NDArray[np.float64]] = {name: np.zeros(0) for name in _COLUMNS}
        self._prefill_free_s: Seconds = np.zeros((num_ranks, 0))
        self.answer_lengths = AnswerLengths()
        self._pace = PaceKeeper(self.answer_lengths.mean_tokens)
        self._copies = Copies()
        #: By row: when its last report was, if all its seats were taken then; else not a number.
        self._crowded_s: list[float] = []
        #: By row: as the worker was told to take at most.
        self._most_seats: list[float] = []
        self._forecast = DecodeForecast(longest_wait_s, self._pace.pace)
        #: Made when asked for after a worker or its costs changed.
        self._outlook: Outlook | None = None

    # --- who is there -----------------------------------------------------------------------------

    def insert(self, row: int, info: WorkerInfo, now_s: float) -> None:
        self._infos.insert(row, info)
        self._tables.insert(row, None)
        self._told_answers.insert(row, ())
        self._told_tokens.insert(row, 0)
        self._told_unread.insert(row, ())
        self._crowded_s.insert(row, math.nan)
        for name, column in self._columns.items():
            self._columns[name] = np.insert(column, row, 0.0)
        block_tokens = info.identity.layout.block_tokens
        for name in ("free_tokens", "open_tokens", "total_tokens"):
            self._columns[name][row] = count_of(info.total_blocks) * block_tokens
        # A mixed worker keeps what it reads.
        is_told = info.role == "prefill" and info.handoff_blocks > 0
        handoff_tokens = count_of(info.handoff_blocks) * block_tokens if is_told else math.inf
        self._columns["handoff_tokens"][row] = handoff_tokens
        spare_tokens = min(handoff_tokens, count_of(info.total_blocks) * block_tokens)
        # A store has no prompts: it is never short of room for them.
        self._columns["spare_tokens"][row] = math.inf if info.role == "store" else spare_tokens
        most_seats = self._columns["seats"][row] = _most_seats(info)
        self._most_seats.insert(row, most_seats)
        self._prefill_free_s = np.insert(self._prefill_free_s, row, now_s, axis=1)
        self._forecast.insert(row, now_s)
        self._count_unread()
        self._outlook = None

    def delete(self, row: int) -> None:
        del self._infos[row], self._tables[row], self._told_answers[row], self._told_unread[row]
        del self._told_tokens[row], self._crowded_s[row], self._most_seats[row]
        for name, column in self._columns.items():
            self._columns[name] = np.delete(column, row)
        self._prefill_free_s = np.delete(self._prefill_free_s, row, axis=1)
        self._forecast.delete(row)
        self._count_unread()
        self._outlook = None

    def set_costs(self, row: int, costs: WorkerCosts | None) -> None:
        present = self._tables[row]
        if (None if present is None else present.costs) is costs:
            return
        if costs is None:
            self._tables[row] = None
        else:
            if len(self._made) >= _MAX_TABLES:
                self._made = {id(table.costs): table for table in self._tables if table is not None}
            table = self._made.get(id(costs))
            if table is None:
                table = self._made[id(costs)] = CostTable(costs)
            self._tables[row] = table
        self._outlook = None

    # --- what they do -----------------------------------------------------------------------------

    def report(
        self, row: int, load: WorkerLoad, booked_s: float, num_booked: int, view: FleetView, now_s: float
    ) -> None:
        """`booked_s`: seconds of reading that were placed within the grace; `num_booked`: prompts or answers."""
        columns, info = self._columns, self._infos[row]
        columns["num_decodes"][row] = count_of(load.running_decodes)
        columns["context_tokens"][row] = context_tokens = count_of(load.context_tokens - load.unread_tokens)
        free_blocks = count_of(load.free_blocks) + count_of(load.cached_blocks)
        block_tokens = info.identity.layout.block_tokens
        # What is reserved for prompts that are still being read counts where their answers begin.
        for_unread_tokens = min(count_of(load.reserved_blocks) * block_tokens, count_of(load.unread_tokens))
        free_tokens = columns["free_tokens"][row] = free_blocks * block_tokens + for_unread_tokens
        total_tokens = columns["total_tokens"].item(row)
        columns["open_tokens"][row] = min(float(free_tokens) + float(context_tokens), total_tokens)
        columns["waiting_offers"][row] = count_of(load.waiting_offers)
        untaken_tokens = columns["untaken_tokens"][row] = count_of(load.offered_blocks) * block_tokens
        columns["spare_tokens"][row] = min(columns["handoff_tokens"].item(row), total_tokens) - untaken_tokens
        columns["booked_answers"][row] = num_booked
        told_unread = self._told_unread[row]
        if load.unread_for is not told_unread and load.unread_for != told_unread:
            self._add_unread(row, -1)
            self._told_unread[row] = load.unread_for
            self._add_unread(row, 1)
        if info.role in ("decode", "mixed"):
            self._forecast.advance(now_s)
            self._note_answers(row, load, context_tokens, now_s)
        if info.role in ("prefill", "mixed"):
            self._note_prompts(row, load, booked_s, view, now_s)

    def says_nothing(self, row: int, load: WorkerLoad, now_s: float) -> bool:
        """Whether a report like the last one, of a worker to which nothing was given meanwhile, changes nothing: a
        worker that only reads prompts and has none."""
        if load.pending_prompt_tokens > 0 or self._infos[row].role != "prefill":
            return False
        return self._prefill_free_s.item(-1, row) <= now_s

    def _add_unread(self, row: int, times: int) -> None:
        column = self._columns["unread_answers"]
        for worker_id, count in self._told_unread[row]:
            writer, is_here = find_row(worker_id, self._infos)
            if is_here:
                column[writer] += times * count_of(count)

    def _count_unread(self) -> None:
        """After a worker came or went: others may have told of it."""
        self._columns["unread_answers"][:] = 0.0
        for row in range(len(self._infos)):
            self._add_unread(row, 1)

    def _note_answers(self, row: int, load: WorkerLoad, context_tokens: int, now_s: float) -> None:
        told, num_tokens = self._told_answers[row], 0
        if load.answers is not told and load.answers != told:
            told_tokens = _num_tokens(load.answers)
            num_tokens = told_tokens - self._told_tokens[row]
            self.answer_lengths.ended(load.answers, told)
            self._told_answers[row], self._told_tokens[row] = load.answers, told_tokens
            self._pace.note_lengths(self.answer_lengths.mean_tokens)
        table, num_decodes = self._tables[row], count_of(load.running_decodes)
        seats = self._note_seats(row, load, num_decodes)
        if table is not None and num_decodes:
            step_s = table.decode_s(min(num_decodes, seats), context_tokens, min(1.0, seats / num_decodes))
            crowded_s, self._crowded_s[row] = self._crowded_s[row], math.nan
            is_crowded = self._infos[row].role == "decode" and (num_decodes > seats or load.waiting_offers > 0)
            if is_crowded:
                self._crowded_s[row] = now_s
            if is_crowded and crowded_s < now_s and num_tokens >= 0:
                self._pace.note_step(step_s, seats * (now_s - crowded_s), num_tokens)
            else:
                self._pace.note_step(step_s)
        self._forecast.report(row, num_decodes, context_tokens, now_s, seats)

    def _note_seats(self, row: int, load: WorkerLoad, num_decodes: int) -> float:
        """As `Outlook.seats`."""
        seats, info = self._columns["seats"], self._infos[row]
        num_running, most = count_of(load.running_requests), self._most_seats[row]
        present = seats.item(row)
        if info.role == "decode" and load.waiting_offers > 0 < num_running:
            # The others that hold blocks do not write yet.
            present = num_running + _PAST_SHARE * max(0.0, min(present, num_decodes) - num_running)
        elif present < most:
            # As slowly as it may have become less crowded, for answers end one by one.
            present *= _MORE_SEATS
        present = seats[row] = max(1.0, min(present, most))
        return present

    def _note_prompts(self, row: int, load: WorkerLoad, booked_s: float, view: FleetView, now_s: float) -> None:
        """Corrects when it will have read everything."""
        table, free_s = self._tables[row], self._prefill_free_s[:, row]
        if table is None:
            return
        pending_tokens = count_of(load.pending_prompt_tokens)
        told_s = now_s
        if pending_tokens:
            pending_s = table.pending_s(pending_tokens, min(load.pending_prompt_pairs, float(LARGEST_COUNT) ** 2))
            if self._infos[row].role == "mixed":
                outlook = self.outlook(view)
                extra_s = float(outlook.step_extra_s(outlook.decoding_at(now_s))[row])
                pending_s += math.ceil(pending_tokens / table.max_batch_tokens) * extra_s
            told_s += max(0.0, pending_s - max(0.0, load.step_age_s))
        believed_s = max(free_s.item(-1), now_s)
        total_s = min(max(believed_s, told_s), told_s + booked_s)
        if len(free_s) == 1:
            free_s[0] = total_s if total_s > believed_s else min(free_s.item(0), total_s)
            return
        if total_s > believed_s:
            # Nobody knows whose it is: everybody waits for it.
            for rank in range(len(free_s)):
                free_s[rank] = min(max(free_s.item(rank), now_s) + (total_s - believed_s), total_s)
            return
        for rank in range(len(free_s)):
            if free_s.item(rank) > total_s:
                free_s[rank] = total_s

    def note_placed(self, item: DispatchItem) -> None:
        """Of every placement, whether anything was predicted of it or not."""
        self._pace.note_placed(count_of(item.prompt_tokens), count_of(item.max_tokens))

    def book(self, item: DispatchItem, prefill_row: int, decode_row: int, plan: Plan, now_s: float) -> None:
        free_s, columns = self._prefill_free_s, self._columns
        # One by one: there are few ranks.
        for rank in range(plan.rank, len(free_s)):
            free_s[rank, prefill_row] = max(free_s.item(rank, prefill_row), now_s) + plan.prefill_s
        if plan.source_row >= 0:
            columns["source_free_s"][plan.source_row] = plan.fetched_s
        if plan.replica_s:
            replica_free_s = columns["replica_free_s"]
            free_then_s = max(replica_free_s.item(prefill_row), now_s) + plan.replica_s
            replica_free_s[prefill_row] = free_then_s
            self._copies.latest_s = max(self._copies.latest_s, free_then_s)
        fade = math.exp((columns["reading_as_of_s"].item(prefill_row) - now_s) / READING_WINDOW_S)
        columns["reading_s"][prefill_row] = columns["reading_s"].item(prefill_row) * fade + plan.prefill_s
        columns["reading_as_of_s"][prefill_row] = now_s
        self._forecast.advance(now_s)
        self._forecast.add(decode_row, plan.begin_s, count_of(item.prompt_tokens))
        columns["booked_answers"][decode_row] += 1.0

    # --- what dispatch looks at -------------------------------------------------------------------

    def outlook(self, view: FleetView) -> Outlook:
        """A window on the columns; stale once a worker or its costs changed. `view` is that of the same rows."""
        if self._outlook is None:
            self._outlook = self._make_outlook(view)
        return self._outlook

    def _make_outlook(self, view: FleetView) -> Outlook:
        kinds = list(dict.fromkeys(table for table in self._tables if table is not None))
        index = {id(table): number for number, table in enumerate(kinds)}
        own = np.array([-1 if table is None else index[id(table)] for table in self._tables], np.int64)
        can_write = view.is_writer | view.is_mixed
        read_kind = _with_guesses(own, view.can_read)
        pairs = list(zip(read_kind.tolist(), view.kv_class.tolist(), strict=True))
        readers = [pair for pair, reads in zip(pairs, view.can_read.tolist(), strict=True) if reads]
        groups = {pair: number for number, pair in enumerate(dict.fromkeys(readers or pairs))}
        columns: dict[str, Any] = dict(self._columns)
        full_step_s = np.array([kind.full_step_s for kind in kinds] or [0.0])[read_kind]
        return Outlook(
            tables=stack(kinds, any_mixed=bool(view.is_mixed.any())),
            knows_reading=bool((own[view.can_read] >= 0).any()),
            knows_writing=bool((own[can_write] >= 0).any()),
            any_mixed=bool(view.is_mixed.any()),
            read_groups=tuple(ReadGroup(*pair) for pair in groups),
            read_group=np.array([groups.get(pair, 0) for pair in pairs], np.int64),
            budget_tokens=np.array([kind.max_batch_tokens for kind in kinds] or [1], np.int64)[read_kind],
            full_step_s=full_step_s,
            half_step_s=0.5 * full_step_s,
            write_kind=_with_guesses(own, can_write),
            prefill_free_s=self._prefill_free_s,
            decoding=self._forecast.table,
            slots=self._forecast.slots,
            pace=self._pace.pace,
            copies=self._copies,
            **columns,
        )


def _num_tokens(tallies: Sequence[AnswerTally]) -> int:
    return sum([count_of(tally.output_tokens) for tally in tallies])


def _most_seats(info: WorkerInfo) -> float:
    return float(count_of(info.max_sequences) or LARGEST_COUNT)


def _with_guesses(own: Counts, role: NDArray[np.bool_]) -> Counts:
    """Kinds by row; where nothing is known, the one that most of the role are of."""
    known = own[role & (own >= 0)]
    guess = int(np.bincount(known).argmax()) if known.size else 0
    return np.where(own >= 0, own, guess)
