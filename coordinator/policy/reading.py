"""When a prompt would have been read, by worker: predicted TTFT with the prefixes that workers hold.

Mooncake's conductor (FAST'25, algorithm 1): a worker uses what it holds of the prompt itself, or fetches more from one
that holds more, where that is worth it; what is fetched stays, so that prefixes spread to where load sends their
requests. Who may give it, and what it must save, is said in `coordinator.policy.sources`. A fetch runs while the prompt
waits in the queue: only what it takes longer is waited for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from coordinator.policy.holding_up import held_up_s
from coordinator.policy.sources import Sources, is_cheaper

if TYPE_CHECKING:
    from coordinator.policy.fleet_view import Counts, FleetView, Seconds
    from coordinator.policy.outlook import Outlook
    from coordinator.policy.question import Question
    from coordinator.policy.sources import FetchRules, Link, Source

#: So many different lengths of held prefixes are looked at for each group of workers; where there are more, a worker
#: counts as holding the next smaller of these.
_MAX_LENGTHS = 32
#: So many holders are looked at one by one.
_FEW_HOLDERS = 8


class Kind(NamedTuple):
    """Workers with one kind have one way to read a prompt."""

    group: int
    held_blocks: int
    #: Its budget of copies is not used up.
    may_copy: bool = True
    #: From each of the class's sources, by which power of two a transfer takes longer; empty: all take the same.
    powers: tuple[int, ...] = ()


class Way(NamedTuple):
    """How a worker gets a prompt read: alone, or with a fetch."""

    read_s: float
    held_blocks: int
    #: 0 without a fetch.
    fetch_s: float
    #: None: nothing is fetched.
    source: Source | None
    #: It would be, but for the budget of copies.
    is_withheld: bool = False

    @property
    def source_blocks(self) -> int:
        """0: nothing is fetched."""
        return 0 if self.source is None else self.source.blocks

    @property
    def cached_blocks(self) -> int:
        """Leading ones that need not be computed."""
        return self.held_blocks if self.source is None else self.source.blocks


class Reading(NamedTuple):
    """What is expected on one worker."""

    queue_s: float
    #: Of that, for which the worker would not wait if its prompts were taken at once.
    held_up_s: float
    #: A fetch, as far as it takes longer than the queue.
    fetch_wait_s: float
    read_s: float
    #: What it adds to the worker's work: less than it takes alone where others' prompts fill the steps.
    work_s: float
    #: Of the prompt, computed in its last step.
    last_tokens: int
    way: Way

    @property
    def reach_s(self) -> float:
        return self.queue_s + self.fetch_wait_s + self.read_s


_FROM_NOTHING = Kind(0, 0)


class Prompt:
    """One question's prompt: each way to read it is priced once. `rules` None: nothing is fetched."""

    def __init__(
        self, question: Question, view: FleetView, outlook: Outlook, link: Link, rules: FetchRules | None
    ) -> None:
        self._question = question
        self._view = view
        self._outlook = outlook
        self._link = link
        #: None: nothing is fetched.
        self.sources = None
        if rules is not None and question.held_lengths:
            self.sources = Sources(question, view, outlook, link, rules)
        #: By row: budgets of copies that are not used up. None: nobody's is.
        self._may_copy = None if self.sources is None else self.sources.may_copy()
        self._uneven_columns: list[Counts] | None = None
        self._ways: dict[Kind, Way] = {}
        self._read_s: dict[tuple[int, int], float] = {}
        self._step_extra_s: Seconds | None = None
        self._held_up_s = held_up_s(question, view, outlook)

    def reach_s(self) -> Seconds:
        """By row: seconds from now to the first token."""
        question, outlook = self._question, self._outlook
        queue_s = outlook.queue_s(question.rank, question.now_s)
        if self._held_up_s is not None:
            queue_s = np.maximum(queue_s, self._held_up_s)
        if len(outlook.read_groups) == 1 and not outlook.any_mixed and not self._uneven():
            holders = self._few_holders()
            if holders is not None:
                return self._reach_s_alike(queue_s, holders)
        codes, kinds = self._kinds()
        # Lists first: setting an element of an array takes ten times as long.
        read_s, fetch_s, cached_blocks = ([0.0] * len(kinds) for _ in range(3))
        for code, kind in enumerate(kinds):
            if kind is not None:
                way = self.way(kind)
                read_s[code], fetch_s[code], cached_blocks[code] = way.read_s, way.fetch_s, way.cached_blocks
        begin_s = np.maximum(queue_s, np.array(fetch_s).take(codes)) if any(fetch_s) else queue_s
        reach_s: Seconds = begin_s + outlook.company_s(queue_s, question.now_s)
        reach_s += np.array(read_s).take(codes)
        if not outlook.any_mixed:
            return reach_s
        cached_tokens = np.array(cached_blocks).take(codes) * self._link.block_tokens
        return reach_s + self._extra_s(question.item.prompt_tokens - cached_tokens)

    def _kinds(self) -> tuple[Counts, list[Kind | None]]:
        """A code by row, and by code what it stands for; None where no worker has it."""
        question, outlook = self._question, self._outlook
        lengths = self._lengths()
        num_lengths, num_groups = len(lengths), len(outlook.read_groups)
        codes: Counts = outlook.read_group
        if question.held is not None:
            # The last one that is not above what is held.
            places = np.array(lengths[1:], question.held.dtype).searchsorted(question.held, "right")
            codes = places if num_groups == 1 else codes * num_lengths + places
        uneven = self._uneven()
        if not uneven:
            present = range(num_lengths) if num_groups == 1 else set(codes.tolist())
            kinds: list[Kind | None] = [None] * (num_groups * num_lengths)
            for code in present:
                kinds[code] = Kind(code // num_lengths, lengths[code % num_lengths])
            return codes, kinds
        places_of: dict[tuple[int, ...], int] = {}
        columns = [codes.tolist(), *(column.tolist() for column in uneven)]
        own = [places_of.setdefault(key, len(places_of)) for key in zip(*columns, strict=True)]
        return np.array(own, np.int64), [
            Kind(code // num_lengths, lengths[code % num_lengths], bool(may), tuple(powers))
            for code, may, *powers in places_of
        ]

    def _uneven(self) -> list[Counts]:
        """What tells workers apart beside their group and what they hold, by row: whether each may copy; then, of each
        of its class's sources, the power of the way from there. Empty: nothing does."""
        if self._uneven_columns is None:
            columns = self._find_uneven()
            is_even = self._may_copy is None and not any(column.any() for column in columns[1:])
            self._uneven_columns = [] if is_even else columns
        return self._uneven_columns

    def _find_uneven(self) -> list[Counts]:
        if self._may_copy is None and (self.sources is None or self.sources.pairs is None):
            return []
        view, outlook = self._view, self._outlook
        may_copy = view.everybody if self._may_copy is None else self._may_copy
        columns: list[Counts] = [may_copy.astype(np.int64)]
        if self.sources is None or self.sources.pairs is None:
            return columns
        for kv_class in dict.fromkeys(group.kv_class for group in outlook.read_groups):
            rows = view.kv_class == kv_class
            sources = (*self.sources.first(kv_class), *self.sources.second(kv_class))
            for number, source in enumerate(sources):
                if number + 1 == len(columns):
                    columns.append(np.zeros(len(view.infos), np.int64))
                column = self.sources.pairs.column(view.infos[source.row].worker_id, view)
                columns[number + 1][rows] = column[rows]
        return columns

    def _kind_of(self, row: int) -> Kind:
        """As `_kinds` says, but for lengths that are not looked at one by one."""
        group, held_blocks = self._outlook.read_group.item(row), self._question.held_by(row)
        uneven = self._uneven()
        if not uneven:
            return Kind(group, held_blocks)
        may_copy, *powers = (column.item(row) for column in uneven)
        return Kind(group, held_blocks, bool(may_copy), tuple(powers))

    def _few_holders(self) -> list[tuple[int, int]] | None:
        """Readers that hold a part of the prompt, and how much; None: too many to look at one by one."""
        held = self._question.held
        if held is None:
            return []
        if self._question.is_kept:
            held = held * self._view.can_read
        rows = held.nonzero()[0]
        return list(zip(rows.tolist(), held[rows].tolist(), strict=True)) if len(rows) <= _FEW_HOLDERS else None

    def _reach_s_alike(self, queue_s: Seconds, holders: list[tuple[int, int]]) -> Seconds:
        """Of workers of one group, none of them mixed: all but the holders need the same."""
        company_s = self._outlook.company_s(queue_s, self._question.now_s)
        way = self.way(_FROM_NOTHING)
        reach_s: Seconds = np.maximum(queue_s, way.fetch_s) if way.fetch_s else queue_s.copy()
        reach_s += company_s
        reach_s += way.read_s
        for row, blocks in holders:
            way = self.way(Kind(0, blocks))
            reach_s[row] = max(queue_s.item(row), way.fetch_s) + company_s.item(row) + way.read_s
        return reach_s

    def at(self, row: int) -> Reading:
        """What is expected on one worker."""
        question, outlook = self._question, self._outlook
        queue_s = max(0.0, outlook.prefill_free_s.item(question.rank, row) - question.now_s)
        held_up_s = 0.0
        if self._held_up_s is not None:
            held_up_s = max(0.0, self._held_up_s.item(row) - queue_s)
            queue_s += held_up_s
        kind = self._kind_of(row)
        way = self.way(kind)
        table = outlook.tables.kinds[outlook.read_groups[kind.group].kind]
        cached_tokens = way.cached_blocks * self._link.block_tokens
        new_tokens = question.item.prompt_tokens - cached_tokens
        extra_s = self._extra_s(new_tokens).item(row) if outlook.any_mixed and self._view.is_mixed.item(row) else 0.0
        company_s = outlook.company_at_s(row, queue_s, question.now_s)
        work_s = min(way.read_s, table.share_s(new_tokens, cached_tokens)) if queue_s else way.read_s
        return Reading(
            queue_s=queue_s,
            held_up_s=held_up_s,
            fetch_wait_s=max(0.0, way.fetch_s - queue_s),
            read_s=way.read_s + extra_s + company_s,
            work_s=work_s + extra_s,
            last_tokens=(new_tokens - 1) % table.max_batch_tokens + 1,
            way=way,
        )

    def way(self, kind: Kind) -> Way:
        """On a worker of this kind."""
        way = self._ways.get(kind)
        if way is None:
            way = self._ways[kind] = self._find_way(kind)
        return way

    def replica_s(self, row: int, way: Way) -> float:
        """By how much this way moves on the row's clock of copies."""
        if way.source is None or self.sources is None:
            return 0.0
        num_blocks = self.sources.replica_blocks(self._view.kv_class.item(row), way.source, way.held_blocks)
        return self.sources.replica_s(row, num_blocks * self._link.block_tokens)

    def kv_token_bytes(self, group: int) -> int:
        """What workers of this group hold for a token."""
        kind = self._outlook.tables.kinds[self._outlook.read_groups[group].kind]
        return kind.costs.kv_token_bytes or self._link.kv_token_bytes

    # --- inside -----------------------------------------------------------------------------------

    def _lengths(self) -> tuple[int, ...]:
        lengths = (0, *self._question.held_lengths)
        if len(lengths) <= _MAX_LENGTHS:
            return lengths
        return tuple(lengths[index * (len(lengths) - 1) // (_MAX_LENGTHS - 1)] for index in range(_MAX_LENGTHS))

    def _find_way(self, kind: Kind) -> Way:
        read_kind, kv_class = self._outlook.read_groups[kind.group]
        held_blocks, sources = kind.held_blocks, self.sources
        alone_s = self._price(read_kind, held_blocks)
        # Nobody holds more than the last of the lengths.
        if sources is None or self._question.held_lengths[-1] <= held_blocks:
            return Way(alone_s, held_blocks, 0.0, None)
        first = sources.first(kv_class)
        best = self._best_fetch(kind, alone_s, None, first, kind.powers)
        if (best is None or best.source is None or best.source.wait_s) and (second := sources.second(kv_class)):
            best = self._best_fetch(kind, alone_s, best, second, kind.powers[len(first) :])
        if best is not None:
            return best
        is_withheld = not kind.may_copy and self.way(kind._replace(may_copy=True)).source is not None
        return Way(alone_s, held_blocks, 0.0, None, is_withheld)

    def _best_fetch(
        self, kind: Kind, alone_s: float, best: Way | None, sources: tuple[Source, ...], powers: tuple[int, ...]
    ) -> Way | None:
        """The fastest fetch of `best` and of those from these sources that are worth it, beside reading alone in
        `alone_s`; None: there is none. `powers` of the way from each of them; none: all take the same."""
        link, held_blocks = self._link, kind.held_blocks
        read_kind, kv_class = self._outlook.read_groups[kind.group]
        best_s = alone_s if best is None else best.fetch_s + best.read_s
        for number, source in enumerate(sources):
            if self.sources is None or not self.sources.allows(kv_class, source, held_blocks, kind.may_copy):
                continue
            num_bytes = (source.blocks - held_blocks) * link.block_tokens * self.kv_token_bytes(kind.group)
            fetch_s = link.transfer.transfer_s(num_bytes, 1)
            if powers:
                fetch_s *= 2.0 ** powers[number]
            fetch_s += source.wait_s
            read_s = self._price(read_kind, source.blocks)
            if fetch_s + read_s < best_s and is_cheaper(fetch_s, alone_s - read_s):
                best, best_s = Way(read_s, held_blocks, fetch_s, source), fetch_s + read_s
        return best

    def _price(self, kind: int, held_blocks: int) -> float:
        """Without a fetch."""
        key = kind, held_blocks
        read_s = self._read_s.get(key)
        if read_s is None:
            cached_tokens = held_blocks * self._link.block_tokens
            new_tokens = self._question.item.prompt_tokens - cached_tokens
            read_s = self._read_s[key] = self._outlook.tables.kinds[kind].prompt_s(new_tokens, cached_tokens)
        return read_s

    def _extra_s(self, new_tokens: Seconds | int) -> Seconds:
        """What the answers of mixed workers add to the steps that read the prompt."""
        outlook, view = self._outlook, self._view
        if self._step_extra_s is None:
            self._step_extra_s = outlook.step_extra_s(outlook.decoding_at(self._question.now_s)) * view.is_mixed
        extra: Seconds = np.ceil(new_tokens / outlook.budget_tokens) * self._step_extra_s
        return extra
